"""glibc's allocator keeps freed memory where nobody has chosen otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from covr_lightning.allocator import USERS_OWN

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")

#: Page faults of 20 blocks of 64 MB, each filled and freed.
SCRIPT = """
import json, resource
from covr_lightning.allocator import keep_freed_memory
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
done = keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
print(json.dumps([done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def faults(**variables: str) -> tuple[bool, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(USERS_OWN)}
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
    return tuple(json.loads(result.stdout))


def test_freed_memory_is_used_again() -> None:
    kept, few = faults()
    by_user, many = faults(MALLOC_ARENA_MAX="4")  # whoever sets one of them has chosen
    assert kept is True
    assert by_user is False
    assert few < many / 10  # once, not twenty times
