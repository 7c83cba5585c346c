"""How the C library's allocator treats memory that tensors on the CPU give back."""

from __future__ import annotations

import ctypes
import os
import sys

#: Numbers of glibc's settings, from its malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
#: Environment variables by which a user chooses for himself.
USERS_OWN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next allocation, where that is glibc's to say.

    By default glibc takes every large block (32 MB and more) from the system and gives it back at once, so an update's
    activations are new, zeroed pages each time, which the processor has to fault in one by one. From here on they come
    from the heap, and the heap is not given back. The price: what the process has once used, it keeps.

    The same as ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=… MALLOC_TOP_PAD_=…`` before the process starts, but it
    needs no second start of the process, and child processes do not inherit it. Nothing is done where the user has set
    one of glibc's variables, or preloads an allocator.

    Returns:
        Whether it was done.
    """
    if sys.platform != "linux" or any(name.startswith(USERS_OWN) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    largest = 2**31 - 1
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, largest), mallopt(_TOP_PAD, 2**28)])
