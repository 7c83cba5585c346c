"""Whether every method learns: each trained by its own YAML on a task of 32×32 pixels, beside a random policy.

    python -m benchmarks.learning                 # every method, seed 0; adds rows to benchmarks/learning.csv
    python -m benchmarks.learning --methods SAC DrQ --seeds 0 1 2

A method is `covr fit --config ITS.yaml --config point_reach.yaml`, with the sizes that its augmentation needs for
frames of 32. Passed: its 20 evaluation episodes lie three standard errors above a random policy's, and at least a third
of the way from there to a policy that goes straight to the goal. That says that the parts work, and nothing about which
method is better.

Methods that are guided by a VLM are guided by `PointingVLM` here, which answers from the pixels by a rule: no VLM of
this size knows the task. COVR's rounds do fine-tune the embedded VLM, on what the filter keeps of the run's rows.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from covr_lightning.cli import main as covr
from covr_lightning.envs.point_reach import SPEED, PointReach
from covr_lightning.evaluation import DeterministicPolicy, play_episode
from covr_lightning.vlm.action_text import ActionText
from covr_lightning.vlm.engines.engine import Engine

CSV = Path(__file__).with_name("learning.csv")
TASK = "point_reach.yaml"
EPISODES = 20
#: Of the way from a random policy's return to that of going straight to the goal.
SHARE = 1 / 3


@dataclass(frozen=True)
class Method:
    """A method as it is run here.

    Attributes:
        configs: Its YAML, or a base and a piece behind it.
        settings: What must be set to have it on this task: sizes for frames of 32, lengths of the run.
    """

    configs: tuple[str, ...]
    settings: dict[str, Any]


_CANVAS = {"model.augmentation.size": 36}
_POINTING = {"vlm.engine": "benchmarks.learning.PointingVLM"}
_ONE_ROUND = {
    "model.prior.after_rounds": 1,
    "trainer.callbacks.schedule.psi0_env_steps": 500,
    "trainer.callbacks.settings.max_steps": 4,
    "trainer.callbacks.settings.gradient_checkpointing": False,
}
#: A new method is a line here: its name, its YAML, and what its YAML needs for frames of 32.
METHODS: dict[str, Method] = {
    "SAC": Method(("dmc_sac.yaml",), {}),
    "RAD": Method(("dmc_rad.yaml",), _CANVAS),
    "RAD cutout": Method(
        ("dmc_sac.yaml", "cutout.yaml"), {"model.augmentation.smallest": 3, "model.augmentation.largest": 8}
    ),
    "DrQ": Method(("dmc_drq.yaml",), {"model.augmentation.pad": 2}),
    "SVEA": Method(("dmc_svea.yaml",), {"model.augmentation.pad": 2}),
    "DeepMDP": Method(("dmc_deepmdp.yaml",), {}),
    "CURL": Method(("dmc_curl.yaml",), {"model.augmentation.size": 28}),
    "SPR": Method(
        ("dmc_spr.yaml",),
        {"model.augmentation.size": 28, "model.objectives.jumps": 3, "model.objectives.sequences": 32},
    ),
    "PER": Method(("dmc_per.yaml",), {}),
    "ERE": Method(("dmc_ere.yaml",), {"data.sampler.c_min": 500}),
    "Flare": Method(("dmc_flare.yaml",), _CANVAS),
    "ResAct": Method(("dmc_resact.yaml",), _CANVAS),
    "DPL": Method(("dmc_dpl.yaml",), _CANVAS | _POINTING),
    "APL": Method(("dmc_apl.yaml",), _CANVAS | _POINTING),
    "COVR on SAC": Method(("dmc_covr_sac.yaml",), _POINTING | _ONE_ROUND),
    "COVR on DeepMDP": Method(("dmc_covr_deepmdp.yaml",), _POINTING | _ONE_ROUND),
    "COVR on RAD": Method(("dmc_covr.yaml",), _CANVAS | _POINTING | _ONE_ROUND),
    "M10": Method(("ablations/m10.yaml",), {}),
    "M11": Method(("ablations/m11.yaml",), {}),
}


class PointingVLM(Engine):
    """Answers as a VLM that knows the task would: by the colours' centres of mass, through the text of an action."""

    def open(self, vlm: Any) -> None:
        """Take over the answer's format."""
        self._codec: ActionText = vlm.codec

    def answers(self, frames: Tensor) -> list[str | None]:
        """The full action towards the red goal's centre, of frames (B, 3, H, W) uint8."""
        return [self._codec.encode(action) for action in towards_goal(frames)]

    def use(self, adapter: Path | None) -> None:
        """A rule has no weights."""


def towards_goal(frames: Tensor) -> Tensor:
    """Actions (B, 2) from the white point to the red goal of frames (B, 3, H, W) uint8, in [−1, 1]."""
    red, _, blue = frames.double().unbind(1)
    point = (blue - 40).clamp(min=0)  # white has blue, the goal has no more than the background
    goal = (red - 20).clamp(min=0) * (point == 0)
    return ((_centre(goal) - _centre(point)) / SPEED).clamp(-1, 1)


def _centre(mass: Tensor) -> Tensor:
    """Centres of mass (B, 2), x to the right and y up in [−1, 1], of masses (B, H, W)."""
    _, h, w = mass.shape
    total = mass.sum((1, 2)).clamp(min=1e-9)
    x = (mass.sum(1) * ((torch.arange(w) + 0.5) / w * 2 - 1)).sum(1) / total
    y = (mass.sum(2) * (1 - (torch.arange(h) + 0.5) / h * 2)).sum(1) / total
    return torch.stack([x, y], dim=1)


@dataclass(frozen=True)
class Score:
    """Returns of :data:`EPISODES` episodes.

    Attributes:
        mean: Their mean.
        std: Their standard deviation, over episodes.
    """

    mean: float
    std: float

    @property
    def standard_error(self) -> float:
        """Standard error of the mean."""
        return self.std / math.sqrt(EPISODES)


def play(policy: DeterministicPolicy, seed: int) -> Score:
    """A policy's score in the episodes that a run of this seed is evaluated on."""
    from covr_lightning.data.datamodule import EVAL_SEED_OFFSET

    env = PointReach().make(seed)
    first = seed + EVAL_SEED_OFFSET
    returns = [play_episode(policy, env, first + n).episode_return for n in range(EPISODES)]
    return Score(statistics.mean(returns), statistics.pstdev(returns))


def random_score(seed: int) -> Score:
    """Uniform actions."""
    generator = torch.Generator().manual_seed(seed)
    return play(lambda pixels, **_: torch.rand(1, 2, generator=generator) * 2 - 1, seed)


def straight_score(seed: int) -> Score:
    """Full speed towards the goal, from the pixels."""
    return play(lambda pixels, **_: towards_goal(pixels[:, -3:]).float(), seed)


def needed(seed: int, std: float) -> float:
    """The mean return that counts as having learnt, for returns of this standard deviation."""
    random, straight = random_score(seed), straight_score(seed)
    three_errors = 3 * math.hypot(random.standard_error, std / math.sqrt(EPISODES))
    return random.mean + max(three_errors, SHARE * (straight.mean - random.mean))


def command(name: str, seed: int, folder: Path) -> list[str]:
    """The arguments of `covr` that train a method."""
    method = METHODS[name]
    settings = {
        "runs_dir": folder, "name": name.replace(" ", "_"), "seed_everything": seed, "data.seed": seed,
        "model.seed": seed, "data.eval_episodes": EPISODES, "data.eval_every_env_steps": 10**6,
        "trainer.accelerator": "cpu", "trainer.enable_progress_bar": False, "trainer.enable_checkpointing": False,
        "trainer.logger": False, **method.settings,
    }  # fmt: skip
    flat = [part for key, value in settings.items() for part in (f"--{key}", _text(value))]
    named = [part for config in (*method.configs, TASK) for part in ("--config", config)]
    return ["fit", *named, *flat]


def learn(name: str, seed: int, folder: Path) -> Score:
    """Train a method and give the score of its last evaluation.

    Args:
        name: One of :data:`METHODS`.
        seed: The run's.
        folder: Where the run is written.

    Raises:
        RuntimeError: The run failed.
    """
    if status := covr(command(name, seed, folder)):
        raise RuntimeError(f"{name} ended with exit status {status}.")
    summary = json.loads((folder / name.replace(" ", "_") / "summary.json").read_text())
    last = summary["curve"][-1]
    assert last["env_steps"] == summary["env_steps"]
    return Score(last["return"], last["return_std"])


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def main() -> None:
    """Train the methods and add their scores to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--csv", type=Path, default=CSV)
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        random, straight = random_score(seed), straight_score(seed)
        for name in arguments.methods:
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                score = learn(name, seed, Path(folder))
            row = {
                "date": datetime.date.today().isoformat(), "method": name, "seed": seed,
                "return": f"{score.mean:.2f}", "std": f"{score.std:.2f}", "random": f"{random.mean:.2f}",
                "straight": f"{straight.mean:.2f}", "needed": f"{needed(seed, score.std):.2f}",
                "seconds": f"{time.perf_counter() - start:.0f}",
            }  # fmt: skip
            print(row, flush=True)
            new = not arguments.csv.exists()
            with arguments.csv.open("a", newline="") as file:
                writer = csv.DictWriter(file, row, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
