"""Starting, skipping, failing, waiting and stopping, with a stand-in for `covr fit`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from covr_lightning.errors import ConfigError
from covr_lightning.sweep.processes import Processes
from covr_lightning.sweep.runs import SweepRun
from tests.sweep.stand_in import CONFIGURATION

STAND_IN = (sys.executable, str(Path(__file__).with_name("stand_in.py")))


def runs(folder: Path, *names: str, seeds: tuple[int, ...] = (1,)) -> list[SweepRun]:
    return [SweepRun(f"{name}.yaml", name, seed, folder / name, [], CONFIGURATION) for name in names for seed in seeds]


def run(planned: list[SweepRun], jobs: int = 1) -> tuple[Processes, list[str]]:
    said: list[str] = []
    processes = Processes(planned, jobs, said.append, STAND_IN)
    processes.run()
    return processes, said


def kinds(processes: Processes) -> list[str]:
    return [outcome.kind for outcome in processes.outcomes]


def soon(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_failed_run_does_not_stop_the_others(tmp_path: Path) -> None:
    planned = runs(tmp_path, "fails", "empty", "ok", seeds=(1, 2))
    processes, _ = run(planned)
    assert kinds(processes) == ["failed"] * 4 + ["finished"] * 2
    assert processes.outcomes[0].why == "exit status 2: covr: model.lr is 7; it must be less."
    assert "exit status 0, but it left no summary" in processes.outcomes[2].why
    assert planned[5].curve()[-1] == {"env_steps": 100, "return": 20, "return_std": 1}
    log = planned[4].log.read_text().splitlines()
    assert log[0].startswith("$ covr fit --config ok.yaml")
    assert log[1] == "ok at work"
    # Again: what is finished is not run again, what failed is, in a fresh folder.
    (planned[0].folder / "left").touch()
    processes, said = run(planned)
    assert kinds(processes) == ["failed"] * 4 + ["skipped"] * 2
    assert (tmp_path / "fails" / "seed_1.cut" / "left").is_file()
    assert f"what there was is in {tmp_path / 'fails' / 'seed_1.cut'}" in said[0]
    assert planned[4].log.read_text().count("ok at work") == 1


@pytest.fixture
def hang_up_is_not_ignored() -> Iterator[None]:
    """As it is under nohup, which a sweep respects."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_what_cannot_be_written_or_read_fails_alone(tmp_path: Path) -> None:
    planned = runs(tmp_path, "ok", seeds=(1, 2, 3, 4, 5))
    (tmp_path / "ok").mkdir()
    planned[0].log.mkdir()
    processes, _ = run(planned)
    assert kinds(processes) == ["failed", *["finished"] * 4]
    assert processes.outcomes[0].why.endswith("cannot be written (Is a directory); give another --runs_dir.")
    planned[0].log.rmdir()
    curves = [one.folder / "curve.csv" for one in planned]
    curves[1].write_text("")
    curves[2].write_text("env_steps,return,return_std\n4,30.00,1.00\n100")
    curves[3].unlink()
    processes, _ = run(planned)
    assert kinds(processes) == ["finished", "failed", "failed", "failed", "skipped"]
    assert "curve.csv has no evaluation in it; remove" in processes.outcomes[1].why
    assert all("curve.csv cannot be read" in processes.outcomes[n].why for n in (2, 3))


def test_a_sweep_that_fails_itself_ends_its_runs(tmp_path: Path) -> None:
    planned = runs(tmp_path, "waits", "ok")

    def lock() -> None:
        if planned[0].last_checkpoint.exists():  # it listens from before that on
            raise OSError("anything")

    planned[1].lock = lock  # type: ignore[method-assign]
    processes = Processes(planned, 2, lambda line: None, STAND_IN)
    with pytest.raises(OSError, match="anything"):
        processes.run()
    soon(lambda: "saved after signal 15" in planned[0].log.read_text())


@pytest.mark.parametrize(
    ("signum", "told"),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGHUP, signal.SIGTERM)],
)
def test_a_signal_stops_what_runs_and_the_same_sweep_goes_on(
    tmp_path: Path, signum: int, told: int, hang_up_is_not_ignored: None
) -> None:
    planned = runs(tmp_path, "ok", "waits", seeds=(1, 2))

    def stop() -> None:
        soon(lambda: all(run.last_checkpoint.exists() for run in planned[2:]))
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=stop)
    thread.start()
    processes, _ = run([*planned, *runs(tmp_path, "never")], jobs=2)
    thread.join()
    assert kinds(processes) == ["finished", "finished", "stopped", "stopped", "waiting"]
    assert processes.stopped_by == signum
    assert f"saved after signal {int(told)}\n" in planned[2].log.read_text()
    assert not (tmp_path / "never").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    processes, said = run(planned)
    assert kinds(processes) == ["skipped", "skipped", "finished", "finished"]
    assert "goes on" in "".join(said)


def test_jobs_run_at_the_same_time(tmp_path: Path) -> None:
    planned = runs(tmp_path, "waits", "ok", seeds=(1, 2, 3))
    at_once: list[int] = []

    def let_go() -> None:
        soon(lambda: sum(run.last_checkpoint.exists() for run in planned) == 2)
        time.sleep(0.5)
        at_once.append(sum(run.log.exists() for run in planned))
        (tmp_path / "waits" / "go").touch()

    thread = threading.Thread(target=let_go)
    thread.start()
    processes, _ = run(planned, jobs=2)
    thread.join()
    assert at_once == [2]
    assert kinds(processes) == ["finished"] * 6


SWEEP = """
import sys
from pathlib import Path
from tests.sweep.test_processes import run, runs
run(runs(Path(sys.argv[1]), "waits", "ok"))
"""


def test_the_run_of_a_killed_sweep_is_waited_for(tmp_path: Path) -> None:
    planned = runs(tmp_path, "waits", "ok")
    root = Path(__file__).parents[2]
    sweep = subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(root)}, cwd=root
    )
    soon(planned[0].last_checkpoint.exists)
    sweep.kill()
    assert sweep.wait() == -signal.SIGKILL
    assert planned[0].lock() is None  # its run is still there
    threading.Timer(1.0, (tmp_path / "waits" / "go").touch).start()
    processes, said = run(planned)
    assert kinds(processes) == ["skipped", "finished"]  # no second process wrote the first
    assert "is still being written" in said[0]
    assert planned[0].log.read_text().count("waits at work") == 1


def test_what_a_killed_run_left_is_gone_on_with(tmp_path: Path) -> None:
    (cut,) = planned = runs(tmp_path, "waits")
    with cut.root.parent.joinpath("output").open("wb") as output:
        arguments = [*STAND_IN, *cut.arguments("new")]
        process = subprocess.Popen(arguments, stdout=output)
    soon(cut.last_checkpoint.exists)
    process.kill()
    process.wait()
    assert cut.state() == "cut"
    assert kinds(run(planned)[0]) == ["finished"]


def test_a_folder_of_another_configuration(tmp_path: Path) -> None:
    (done,) = runs(tmp_path, "ok")
    run([done])
    assert done.state() == "finished"
    other = json.loads(json.dumps(CONFIGURATION)) | {"model": {"lr": 2}}
    changed = SweepRun("ok.yaml", "ok", 1, tmp_path / "ok", [], other)
    with pytest.raises(ConfigError, match=r"ok/seed_1 holds .* \(model\.lr is 1 there, 2 here\)"):
        changed.state()
    processes, _ = run([changed])  # should it appear while the sweep runs
    assert kinds(processes) == ["failed"]
    assert (done.folder / "summary.json").is_file()
    # A run that was made longer by hand, and cut, is not finished; nor is one whose summary is damaged.
    longer = {**CONFIGURATION, "data": {"init_args": {"max_env_steps": 200}}}
    (done.folder / "config.yaml").write_text(json.dumps(longer))
    done.last_checkpoint.parent.mkdir()
    done.last_checkpoint.touch()
    assert SweepRun("ok.yaml", "ok", 1, tmp_path / "ok", [], longer).state() == "cut"
    (done.folder / "config.yaml").write_text(json.dumps(CONFIGURATION))
    (done.folder / "summary.json").write_text('{"env_steps": 1')
    assert done.state() == "cut"
