"""The table of methods: parts, lines of code, YAML, parameters, time of an update, whether it learns, and the paper's.

    OMP_NUM_THREADS=2 python -m benchmarks.methods --time     # times the updates anew (minutes), then prints the table
    python -m benchmarks.methods --write                      # the table as it stands, into docs/methods.md and README

Each method is what its YAML builds. Lines are those of the parts' own classes without blanks, comments and docstrings.
Times are of one update, the mean of one without and one with the actor's turn, at batch 128 on random frames of the
size that the YAML renders; each method takes turns with SAC, and the medians are compared. Scores are read from
`benchmarks/learning.csv`, which `benchmarks/learning.py` writes.
"""

from __future__ import annotations

import argparse
import ast
import csv
import datetime
import gc
import inspect
import io
import statistics
import tempfile
import textwrap
import time
import tokenize
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from covr_lightning.callbacks import ProgressiveFineTune
from tensordict import TensorDict

from benchmarks.learning import CSV as LEARNING
from benchmarks.learning import METHODS
from covr_lightning.agent import ConvTrunk, GaussianActor, NoAugmentation, NoPrior, OneView, SACModule
from covr_lightning.config_files import resolve_arguments
from covr_lightning.data import ExperienceData
from covr_lightning.envs import EnvSpec
from covr_lightning.finetune import NeverSchedule, VLMFineTuner
from covr_lightning.published import published_results
from covr_lightning.training import CovrCLI

ROOT = Path(__file__).parents[1]
TIMES = Path(__file__).with_name("update_times.csv")
#: What a slot holds when nothing is in it.
NULL = (NoAugmentation, OneView, ConvTrunk, GaussianActor, NoPrior)
#: Methods whose update is another's: they differ in the VLM's work and in λ.
SAME_UPDATE = {"DPL": "COVR on RAD", "APL": "COVR on RAD"}
#: Methods whose YAML is of another base than SAC's, so that their times do not compare.
NOT_TIMED = ("M10", "M11")
#: Where the paper has a method: its name in Tables 3 and 4, and in Table 1 or 5.
PUBLISHED = {
    "COVR on SAC": ("SAC+COVR", None),
    "COVR on DeepMDP": ("DeepMDP+COVR", "COVR (Ours)"),
    "COVR on RAD": ("RAD+COVR", None),
}
BEGIN, END = "<!-- benchmarks/methods.py writes from here -->", "<!-- to here -->"


class Built(CovrCLI):
    """A run's parts, built and not run."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Train nothing."""


def build(configs: Iterable[str]) -> Built:
    """Everything that these configs name."""
    with tempfile.TemporaryDirectory() as folder:
        named = [part for config in configs for part in ("--config", config)]
        arguments, _ = resolve_arguments(["fit", *named, "--runs_dir", folder])
        return Built(
            SACModule, ExperienceData, subclass_mode_model=True, subclass_mode_data=True,
            auto_configure_optimizers=False, save_config_callback=None, args=arguments,
        )  # fmt: skip


def parts_of(cli: Built) -> list[type]:
    """The classes that a method adds to plain SAC."""
    model: SACModule = cli.model
    parts: list[Any] = [model.augmentation, model.views, model.trunk, model.actor, *model.objectives, model.prior]
    parts += [value for value in (getattr(model.views, "strong", None), cli.datamodule.sampler) if value is not None]
    kinds = [type(part) for part in parts if type(part) not in NULL]
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ProgressiveFineTune) and not isinstance(callback.schedule, NeverSchedule):
            slots = (callback.schedule, callback.filter, callback.weight)
            kinds += [ProgressiveFineTune, *(type(slot) for slot in slots), VLMFineTuner]
    return kinds


def lines_of_code(part: type) -> int:
    """Lines of a class without blank lines, comments and docstrings."""
    source = textwrap.dedent(inspect.getsource(part))
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        first = node.body[0] if isinstance(node, ast.ClassDef | ast.FunctionDef) else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def trainable_parameters(model: SACModule) -> int:
    """Numbers that the agent's optimizers change; the targets are none of them."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def random_batch(spec: EnvSpec, n: int) -> TensorDict:
    """Transitions (n,) of random frames, every tenth of them labelled."""
    g = torch.Generator().manual_seed(0)
    frames, actions = (n, spec.channels, spec.frame_height, spec.frame_width), (n, spec.action_dim)
    draw = {
        "pixels": lambda: torch.randint(0, 256, frames, dtype=torch.uint8, generator=g),
        "action": lambda: torch.rand(actions, generator=g) * 2 - 1,
    }
    return TensorDict(
        {
            "pixels": draw["pixels"](), "action": draw["action"](), "previous_action": draw["action"](),
            "a_v": draw["action"](), "a_v_valid": (torch.arange(n) % 10 == 0)[:, None],
            "next": {
                "pixels": draw["pixels"](), "reward": torch.rand(n, 1, generator=g),
                "terminated": torch.zeros(n, 1, dtype=torch.bool),
            },
        },
        [n],
    )  # fmt: skip


def random_sequences(spec: EnvSpec, length: int, n: int) -> TensorDict:
    """Windows (n,) of random frames, each of `length` steps."""
    g = torch.Generator().manual_seed(1)
    frames = (n, length + 1, spec.channels, spec.frame_height, spec.frame_width)
    actions = torch.rand(n, length, spec.action_dim, generator=g) * 2 - 1
    pixels = torch.randint(0, 256, frames, dtype=torch.uint8, generator=g)
    return TensorDict({"pixels": pixels, "action": actions}, [n])


def update_of(model: SACModule, n: int) -> Callable[[], None]:
    """Two updates of a model, one of them with the actor's turn, without a Trainer."""
    optimizers = model.configure_optimizers()
    model.optimizers = lambda *a, **k: optimizers  # type: ignore[method-assign, assignment]
    model.manual_backward = lambda loss, *a, **k: loss.backward()  # type: ignore[method-assign]
    model.counters.rounds = 10  # guidance is on
    batch = random_batch(model.spec, n)
    for objective in model.objective_list:
        if objective.sequences:
            windows = random_sequences(model.spec, objective.sequence_length, objective.sequences)
            batch.batch_size = torch.Size([])
            batch["sequences"] = windows

    def updates() -> None:
        model.training_step(batch)
        model.training_step(batch)

    return updates


def time_updates(names: Iterable[str], n: int, turns: int) -> dict[str, tuple[float, float]]:
    """Each method's update beside SAC's, the two taking turns.

    No third model is held meanwhile: of a dozen held at once, the last ones took several times as long.

    Args:
        names: The methods.
        n: Transitions in a batch.
        turns: Pairs of updates of each, after a first one that allocates.

    Returns:
        Median seconds of the method's update, and over SAC's.
    """
    sac = update_of(build(METHODS["SAC"].configs).model, n)
    measured = {}
    for name in names:
        method = update_of(build(METHODS[name].configs).model, n)
        taken: tuple[list[float], list[float]] = ([], [])
        for turn in range(turns + 1):
            for update, times in zip((sac, method), taken, strict=True):
                start = time.perf_counter()
                update()
                if turn:
                    times.append((time.perf_counter() - start) / 2)
        del method
        gc.collect()  # a module is in a cycle
        seconds = statistics.median(taken[1])
        measured[name] = (seconds, seconds / statistics.median(taken[0]))
    return measured


def write_times(n: int, turns: int) -> None:
    """Time the updates and write them down."""
    names = [name for name in METHODS if name not in (*SAME_UPDATE, *NOT_TIMED)]
    measured = time_updates(names, n, turns)
    with TIMES.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["date", "method", "batch", "threads", "turns", "milliseconds", "relative"])
        for name, (seconds, relative) in measured.items():
            row = [datetime.date.today().isoformat(), name, n, torch.get_num_threads(), turns]
            writer.writerow([*row, f"{1000 * seconds:.0f}", f"{relative:.2f}"])


def relative_times() -> dict[str, str]:
    """Each method's time of an update over SAC's, as it was last measured."""
    times = {row["method"]: row["relative"] for row in _rows(TIMES)}
    return times | {name: times[like] for name, like in SAME_UPDATE.items() if like in times}


def scores() -> dict[str, tuple[str, str]]:
    """Each method's return on the small task, and a random policy's in the same episodes: means over the seeds."""
    returns: dict[str, dict[str, dict[str, str]]] = {}
    for row in _rows(LEARNING):
        returns.setdefault(row["method"], {})[row["seed"]] = row  # the newest of a seed
    told = {}
    for name, seeds in returns.items():
        values = [float(row["return"]) for row in seeds.values()]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        random = statistics.mean(float(row["random"]) for row in seeds.values())
        told[name] = (f"{statistics.mean(values):.1f}{spread}", f"{random:.1f}")
    return told


def published(name: str) -> tuple[str, str]:
    """What the paper has: the return on cartpole-swingup (Tables 3 and 4), and ER on #HW (Tables 1 and 5)."""
    dmc, hw = PUBLISHED.get(name, (name, name))
    cartpole = {str(row): None for row in published_results((3, 4), setting="Cartpole", method=dmc)}
    driving = {str(row): None for row in published_results((1, 5), method=hw, metric="ER")} if hw else {}
    return "; ".join(cartpole) or "–", "; ".join(driving) or "–"


def table() -> list[str]:
    """The table, a line each, in Markdown."""
    times, learnt = relative_times(), scores()
    lines = [
        "| method | parts beside SAC | lines | YAML | trainable parameters | update, × SAC | point-reach (random) | "
        "paper: cartpole | paper: #HW |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        cli = build(method.configs)
        parts = parts_of(cli)
        score, random = learnt.get(name, ("–", "–"))
        cells = [
            name, ", ".join(f"`{part.__name__}`" for part in parts) or "–", str(sum(map(lines_of_code, parts)) or "–"),
            " + ".join(f"`{config}`" for config in method.configs), f"{trainable_parameters(cli.model) / 1e6:.2f} M",
            times.get(name, "–"), f"{score} ({random})", *published(name),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def compact(lines: list[str]) -> list[str]:
    """The columns that README shows: method, lines, YAML, update, score, and the paper's."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [f"| {' | '.join(row[i] for i in (0, 3, 2, 5, 6, 7, 8))} |" if row[0] != "---" else "|---" * 7 + "|"
            for row in cells]  # fmt: skip


def write(path: Path, lines: list[str]) -> None:
    """Put lines between the two marks of a file."""
    before, _, rest = path.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text("\n".join([f"{before}{BEGIN}", "", *lines, "", f"{END}{after}"]), "utf-8")


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="time the updates anew")
    parser.add_argument("--write", action="store_true", help="write the table into docs/methods.md and README.md")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5, help="pairs of updates of SAC and of each method")
    arguments = parser.parse_args()
    if arguments.time:
        write_times(arguments.batch, arguments.turns)
    lines = table()
    print("\n".join(lines))
    if arguments.write:
        write(ROOT / "docs" / "methods.md", lines)
        write(ROOT / "README.md", compact(lines))


if __name__ == "__main__":
    main()
