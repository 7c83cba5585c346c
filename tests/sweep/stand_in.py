"""Stands in for `covr fit`: leaves what a run leaves, and saves and stops on signals as a run does.

The config's name says what it does: `ok` ends well, `fails` ends with status 2, `empty` with status 0 and no summary,
`waits` saves and then waits for a signal or the file `go`; when it is resumed it ends well at once.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

CONFIGURATION = {"data": {"init_args": {"max_env_steps": 100}}, "model": {"lr": 1}}


def main(arguments: list[str]) -> int:
    def value(flag: str) -> str:
        return arguments[arguments.index(flag) + 1]

    root, seed = Path(value("--runs_dir")), int(value("--data.seed"))
    folder, kind = root / value("--name"), Path(value("--config")).stem
    resumed = "--ckpt_path" in arguments
    assert folder.exists() == resumed  # as `covr fit`, it would write elsewhere
    if resumed:
        assert Path(value("--ckpt_path")) == folder / "checkpoints" / "last.ckpt"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps({**CONFIGURATION, "name": value("--name")}))
    print(f"{kind} at work", flush=True)
    if kind == "fails":
        print("covr: model.lr is 7; it must be less.", file=sys.stderr)
        return 2
    if kind == "empty":
        return 0
    if kind == "waits" and not resumed:
        stopped: list[int] = []
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda number, frame: stopped.append(number))
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.ckpt").touch()
        while not stopped and not (root / "go").exists():
            time.sleep(0.02)
        if stopped:
            print(f"saved after signal {stopped[0]}", flush=True)
            return 128 + stopped[0]
    lines = ["env_steps,return,return_std", "4,30.00,1.00", f"100,{10 * seed}.00,1.00"]
    (folder / "curve.csv").write_text("\n".join(lines) + "\n")
    (folder / "summary.json").write_text(json.dumps({"env_steps": 100}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
