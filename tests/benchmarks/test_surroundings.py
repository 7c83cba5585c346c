"""Benchmarks run in processes as `covr` makes its own."""

from __future__ import annotations

import os
import subprocess
import sys

from covr_lightning.cli import WAIT_POLICY

TOLD = "import os; print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'), *sys.argv[1:])"


def told(**surroundings: str) -> str:
    """What a process says of itself after `as_covr_runs`."""
    own = {name: value for name, value in os.environ.items() if name not in WAIT_POLICY}
    code = f"import sys; from benchmarks.surroundings import as_covr_runs; as_covr_runs(); {TOLD}"
    command = [sys.executable, "-c", code, "--rows", "two words"]
    return subprocess.run(command, env=own | surroundings, capture_output=True, text=True, check=True).stdout.strip()


def test_threads_soon_sleep_unless_told_otherwise() -> None:
    assert told() == "PASSIVE 10000 --rows two words"  # begun anew with the same arguments
    assert told(OMP_WAIT_POLICY="ACTIVE") == "ACTIVE None --rows two words"
