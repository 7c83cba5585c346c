"""What a run leaves behind for its reader: a curve as CSV and PNG, and a closing table."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from covr_lightning.callbacks.checkpoints import is_all_saved
from covr_lightning.callbacks.progressive_finetune import ProgressiveFineTune
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table

from covr_lightning import processes
from covr_lightning.finetune.round import RoundReport
from covr_lightning.run_log import RunCSVLogger, RunTensorBoardLogger
from covr_lightning.saving.files import as_json, write_or_warn
from covr_lightning.vlm.answers import Answers

#: One evaluation: ``env_steps``, then for ``return`` and whatever else is measured the mean and, as ``…_std``, the
#: standard deviation over episodes.
CurvePoint = dict[str, float]


class RunSummary(L.Callback):
    """Writes ``curve.csv`` after each evaluation, and ``curve.png``, ``summary.json`` and a table at the end."""

    def __init__(self) -> None:
        self.curve: list[CurvePoint] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take back what a resumed run had come to after its checkpoint, or that it was finished; tell its prior."""
        if not processes.number():
            folder = Path(trainer.default_root_dir)
            (folder / "summary.json").unlink(missing_ok=True)
            if self.curve:
                write_curve(self.curve, folder / "curve.csv")
            else:
                (folder / "curve.csv").unlink(missing_ok=True)
        if self.curve:
            pl_module.prior.evaluated(self.curve[-1]["return"])  # type: ignore[operator, union-attr]
        steps = trainer.datamodule.counters.env_steps  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            if steps and not processes.number() and isinstance(logger, RunCSVLogger | RunTensorBoardLogger):
                logger.rewind(steps)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write down what is logged so far: a run resumed from this checkpoint will not log it again."""
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.save()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the evaluation to the curve."""
        if trainer.state.fn != "fit" or "eval/return" not in trainer.callback_metrics:
            return
        metrics = trainer.callback_metrics
        steps = trainer.datamodule.counters.env_steps  # type: ignore[attr-defined]
        measured = {name.removeprefix("eval/"): float(v) for name, v in metrics.items() if name.startswith("eval/")}
        measured.pop("episodes", None)
        self.curve = [p for p in self.curve if p["env_steps"] < steps]
        self.curve.append({"env_steps": steps, "return": measured.pop("return"), **measured})
        if trainer.is_global_zero:
            write_curve(self.curve, Path(trainer.default_root_dir) / "curve.csv")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table and the paths; the figures of labels and lost episodes are those of all processes.

        Not when training ends: a run killed between its last checkpoint and this trains no more when it is resumed.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        labels = data.labels
        mine = data.lost_episodes, labels.answers if labels else Answers(), data.policy.answers
        of_lost, of_labels, of_warmup = zip(*processes.gather(mine), strict=True)
        lost, labelled, warmup = sum(of_lost), sum(of_labels, Answers()), sum(of_warmup, Answers())
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        rounds = self._rounds(trainer)
        replay_bytes = data.storage.bytes_per_transition()
        summary = {
            "task": data.spec.task,
            "env_steps": data.counters.env_steps,
            "grad_steps": data.counters.grad_steps,
            "curve": self.curve,
            "replay_bytes_per_transition": replay_bytes,
            "lost_episodes": lost,
            **{f"labels_{name}": count for name, count in asdict(labelled).items()},
            **({f"warmup_{name}": count for name, count in asdict(warmup).items()} if warmup.asked else {}),
            "rounds": [r.as_dict() for r in rounds],
        }
        if is_all_saved(trainer):  # a summary says that a run is over
            write_or_warn(folder / "summary.json", [as_json(summary)])
        console = Console()
        for table in summary_tables(self.curve, rounds):
            console.print(table)
        for what, answers in (("Labels", labelled), ("Warm-up", warmup)):
            if answers.asked:
                missing = f", {answers.unanswered / answers.asked:.1%} without an answer" * (answers.unanswered > 0)
                share = f"{answers.unparsable / answers.asked:.1%}"
                console.print(f"{what}: {answers.asked} frames asked, {share} unparsable{missing}.")
        console.print(f"Replay: {replay_bytes:.0f} bytes per transition.")
        peaks = [r.peak_memory_mb for r in rounds if not math.isnan(r.peak_memory_mb)]
        if peaks:
            console.print(f"Memory: {max(peaks):.0f} MB at most in a fine-tune round.")
        if lost:
            console.print(f"Episodes cut because the simulator was lost: {lost}.")
        if self.curve:
            plot_curve(self.curve, rounds, folder / "curve.png", data.spec.task)
            for name in ("curve.png", "curve.csv", "summary.json"):
                if (folder / name).is_file():
                    print(f"{name:>13}: {folder / name}")
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
            print(f"{'best':>13}: {checkpoint.best_model_path}")

    @staticmethod
    def _rounds(trainer: L.Trainer) -> list[RoundReport]:
        return [
            report
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, ProgressiveFineTune)
            for report in callback.reports
        ]

    def state_dict(self) -> dict[str, Any]:
        """The curve."""
        return {"curve": self.curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the curve."""
        self.curve = list(state_dict["curve"])


def write_curve(curve: list[CurvePoint], path: Path) -> None:
    """Write the learning curve as CSV: env_steps, return, return_std, and whatever else was measured."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(curve[0])
    writer.writerows(
        [int(p["env_steps"]), *(f"{p[name]:.2f}" for name in curve[0] if name != "env_steps")] for p in curve
    )
    write_or_warn(path, [text.getvalue().encode()])


def summary_tables(curve: list[CurvePoint], rounds: list[RoundReport]) -> list[Table]:
    """The closing tables: evaluation before and after, and one row per fine-tune round."""
    tables = []
    if curve:
        table = Table(title="Evaluation (deterministic policy, mean ± std over episodes)")
        measured = [name for name in curve[0] if f"{name}_std" in curve[0]]
        for name in ("", "env steps", *(name.replace("_", " ") for name in measured)):
            table.add_column(name, justify="right")
        best = max(curve, key=lambda point: point["return"])
        for name, point in (("before", curve[0]), ("best", best), ("after", curve[-1])):
            values = [f"{point[m]:.1f} ± {point[f'{m}_std']:.1f}" for m in measured]
            table.add_row(name, str(int(point["env_steps"])), *values)
        tables.append(table)
    if rounds:
        table = Table(padding=(0, 0), title="Fine-tune rounds (VLM error: mean |a_v − a| on held-out kept rows)")
        columns = ("round", "env steps", "kept", "trained", "ε", "before", "after", "constant", "noise", "unparsable")
        for name in columns:
            table.add_column(name, justify="right")
        for r in rounds:
            table.add_row(
                str(r.round), str(r.env_steps), f"{r.kept}/{r.rows}", str(r.trained), _number(r.entropy, 2),
                _number(r.error_before), _number(r.error_after), _number(r.error_constant), _number(r.noise),
                f"{_percent(r.unparsable_before)}→{_percent(r.unparsable_after)}",
            )  # fmt: skip
        notes = "; ".join(f"round {r.round}: {r.note}" for r in rounds if r.note)
        table.caption = notes or None
        tables.append(table)
    return tables


def plot_curve(curve: list[CurvePoint], rounds: list[RoundReport], path: Path, title: str) -> None:
    """Draw the learning curve, a band of one standard deviation, and the rounds as vertical lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, mean, std = ([point[name] for point in curve] for name in ("env_steps", "return", "return_std"))
    axes.plot(steps, mean, marker="o", markersize=3, color="tab:blue", label="evaluation return")
    low, high = [m - d for m, d in zip(mean, std, strict=True)], [m + d for m, d in zip(mean, std, strict=True)]
    axes.fill_between(steps, low, high, color="tab:blue", alpha=0.2, label="± std over episodes")
    for i, r in enumerate(rounds):
        axes.axvline(r.env_steps, color="tab:orange", linestyle="--", label="fine-tune round" if i == 0 else None)
    axes.set(xlabel="environment steps", ylabel="return", title=title)
    axes.set_ylim(bottom=min(0, *low))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_or_warn(path, [image.getvalue()])


def _number(value: float, decimals: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:.{decimals}f}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"
