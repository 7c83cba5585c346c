"""Where the time of a run went: ``profile.json``, and a table if it is asked for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from covr_lightning.agent.sac import SACModule
from covr_lightning.saving.files import as_json, write_or_warn
from covr_lightning.step_times import StepTimes

#: The parts, in the order in which a step comes by them.
PARTS = {
    "environment": "the simulator's steps; with environments in other processes, waiting for them",
    "render": "pictures, in environments of this process",
    "act": "the policy's actions for collection",
    "store": "writing into the replay and D_f",
    "label": "the VLM's answers",
    "sample": "a batch from the replay",
    "critic": "augmentation and the critics' update",
    "actor": "the update of actor and temperature",
    "objectives": "auxiliary objectives",
    "targets": "moving averages",
    "update": "all of the update, where it is made by CUDA graphs",
    "fine-tune": "rounds",
    "evaluation": "episodes, their environment included",
    "checkpoint": "saves",
    "other": "Lightning, callbacks, and whatever has no name here",
}


class RunProfile(L.Callback):
    """Writes ``profile.json`` into the run's folder: seconds and counts of each part of the run, and all its seconds.

    It is written after each evaluation, at a resume and at the end, by the first process, of its own time. A resumed
    run adds to what its checkpoint had. The parts are :data:`PARTS`; a part's seconds are without those of parts inside
    it, and they add up to the total.

    Args:
        show: Also print a table at the end (``--profile true``).
    """

    def __init__(self, show: bool = False) -> None:
        self.show = show
        self._times = StepTimes()
        self._before = 0.0  # seconds of the run that this one resumes
        self._begun: float | None = None
        self._evaluation: Any = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        assert isinstance(pl_module, SACModule), "this callback serves a SACModule"
        self._begun = time.perf_counter()
        pl_module.times.load_state_dict(self._times.state_dict())
        self._times = pl_module.times
        if self._before:
            self._write(trainer)  # what is there may be of steps after the checkpoint

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """An evaluation begins."""
        self._evaluation = self._times("evaluation")
        self._evaluation.__enter__()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """It is over; write what is known so far."""
        self._evaluation.__exit__(None, None, None)
        if trainer.state.fn == "fit":
            self._write(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file, and print the table if asked to."""
        profile = self._write(trainer)
        if self.show and trainer.is_global_zero:
            Console().print(profile_table(profile))

    def profile(self) -> dict[str, Any]:
        """``seconds`` and ``counts`` by part, and ``total_seconds``."""
        total = self._before + (time.perf_counter() - self._begun if self._begun is not None else 0.0)
        state = self._times.state_dict()
        state["seconds"]["other"] = max(0.0, total - sum(state["seconds"].values()))
        return {**state, "total_seconds": total}

    def _write(self, trainer: L.Trainer) -> dict[str, Any]:
        profile = self.profile()
        if trainer.is_global_zero:
            write_or_warn(Path(trainer.default_root_dir) / "profile.json", [as_json(profile)])
        return profile

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`profile` gives."""
        return self.profile()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self._before = state_dict["total_seconds"]
        seconds = {name: value for name, value in state_dict["seconds"].items() if name != "other"}
        self._times.load_state_dict({"seconds": seconds, "counts": state_dict["counts"]})


def profile_table(profile: dict[str, Any]) -> Table:
    """A table of a run's profile.

    Args:
        profile: What ``profile.json`` holds.
    """
    total = profile["total_seconds"]
    table = Table(title=f"Where {total:.1f} s went (a part's time is without that of parts inside it)")
    for name in ("part", "seconds", "share", "times", "ms each"):
        table.add_column(name, justify="left" if name == "part" else "right")
    names = sorted(profile["seconds"], key=lambda name: [*PARTS, name].index(name))
    for name in names:
        seconds, times = profile["seconds"][name], profile["counts"].get(name, 0)
        each = f"{1000 * seconds / times:.2f}" if times else ""
        table.add_row(name, f"{seconds:.2f}", f"{seconds / total:.1%}", str(times or ""), each)
    return table
