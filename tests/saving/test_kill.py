"""kill −9 in the middle of a save, at every step of it and at random moments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_saves.py")), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["killed"] >= 12  # two files, each opened, written, synced, renamed and its folder synced; old parts go
    assert seen["old"] >= 8
    assert seen["new"] >= 2
    assert seen["random"] == 10
    assert seen["saved_between"] >= 10
    assert seen["left over"] == []
