"""Collection against bare dm_control, and the training loop against the sum of its parts.

    python -m benchmarks.collection

Cartpole-swingup with action repeat 8 and random actions. Bare: ``suite.load``, eight steps, one picture, nothing else.
Collector: the same by TorchRL's collector over this package's environment, with stacks of three frames. Stored: and
each transition written into the replay and counted, as a run does in its warm-up. They take turns in blocks of a few
dozen agent steps; a figure is the median over blocks of the processor time of all threads, the renderer's included,
which other work on the machine hardly changes.

The loop: ``Trainer.fit`` with the settings of dmc_cartpole_swingup_cpu.yaml and learning_cpu's, an update per agent
step, in float32 and in bfloat16, by wall clock. Beside it collection (acting and storing included) and update (sampling
included) by themselves, without Lightning: in turns of a few dozen steps, and in turns of one, as a loop must take them
(each finds the caches full of the other's data then). The loop is to take what both take.

Lightning's is what a step of the loop takes outside of the data's stream and of the module's `training_step`, and what
`manual_backward` and the wrapped optimizer's `step` take beside the backward pass and the optimizer's own step. Nothing
here overlaps: rendering and updates both take all cores.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.data import TensorDictReplayBuffer

from benchmarks.surroundings import as_covr_runs, at_least
from covr_lightning.agent import RandomCrop, SACModule
from covr_lightning.data import ExperienceData
from covr_lightning.data.collection import OneCollector
from covr_lightning.data.experience import Experience
from covr_lightning.data.exploration import ExplorationPolicy
from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.data.replay_parts import ReplayParts
from covr_lightning.envs import DMControl, EnvSpec
from covr_lightning.rendering import choose_backend

Precision = Literal["32-true", "bf16-mixed"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

#: Environment steps of an agent step; agent steps before the loop's updates.
REPEAT, WARMUP = 8, 100


def bare(size: int, rendering: str) -> Iterator[None]:
    """An agent step per item."""
    choose_backend()  # before the next line, which reads what it sets
    from dm_control import suite

    env = suite.load("cartpole", "swingup", task_kwargs={"random": 0})
    picture: dict[str, Any] = {"height": size, "width": size, "camera_id": 0}
    if rendering == "fast":
        env.physics.model.vis.quality.offsamples = 0
        picture["render_flag_overrides"] = {"shadow": False, "reflection": False}
    g, step = np.random.default_rng(0), env.reset()
    while True:
        if step.last():
            step = env.reset()
            env.physics.render(**picture)
        action = g.uniform(-1, 1, 1)
        for _ in range(REPEAT):
            step = env.step(action)
        env.physics.render(**picture)
        yield


def collected(
    size: int,
    rendering: Literal["rad", "fast"],
    store: bool,
    agent: Callable[[EnvSpec], SACModule] | None = None,
    replay: TensorDictReplayBuffer | None = None,
) -> Iterator[None]:
    """The same by the collector, and stored if asked for; an agent acts after the warm-up, without one chance does."""
    factory = DMControl("cartpole-swingup", size, rendering=rendering)
    data, collection = ExperienceData(factory), OneCollector()
    acting = agent(factory.spec) if agent else SACModule(factory.spec, hidden=8, filters=4)
    # The data's own clock, by which it knows that the warm-up is over.
    policy = ExplorationPolicy(acting, 1, data.counters, warmup_agent_steps=WARMUP if agent else 10**9)
    collection.open(factory, policy, range(1), 0)
    if replay is None:  # one that is empty is false
        replay = TensorDictReplayBuffer(storage=FrameStackStorage(5000, 3), batch_size=64)
    data.experience = Experience(
        replay, None, None, ReplayParts(Path("never written")), range(1), data.counters, acting.prior, acting.finite,
        data.listeners, acting.training_returns, acting.times,
    )  # fmt: skip
    data.trainer = SimpleNamespace(lightning_module=acting)  # type: ignore[assignment]
    for item in collection.batches():
        if store:
            data._store(item)
        yield


def agent_of_loop(spec: EnvSpec) -> SACModule:
    """The agent of dmc_cartpole_swingup_cpu.yaml."""
    return SACModule(spec, augmentation=RandomCrop(64), hidden=256, strides=(2, 2, 1, 1))


def alone(precision: Precision, blocks: int, block: int) -> dict[str, tuple[float, float]]:
    """Mean wall seconds an agent step of collection and update without Lightning, in turns of blocks and of steps."""
    collection = collected(72, "fast", store=True, agent=agent_of_loop)
    for _ in range(WARMUP):
        next(collection)
    ways = {"collection": collection, "update": updates(precision)}
    by_blocks, by_steps = (
        # An update in two moves the actor too, so single ones have a mean and no median.
        in_turns(ways, blocks * block // length, length, time.perf_counter, statistics.fmean)
        for length in (block, 1)
    )
    return {name: (by_blocks[name], by_steps[name]) for name in ways}


def updates(precision: Precision) -> Iterator[None]:
    """An update per item, on a replay of random actions. Acting computes in float32 in either precision."""
    factory = DMControl("cartpole-swingup", 72, rendering="fast")
    replay = TensorDictReplayBuffer(storage=FrameStackStorage(5000, 3), batch_size=64)
    for _ in zip(range(WARMUP + 200), collected(72, "fast", store=True, replay=replay), strict=False):
        pass
    agent = agent_of_loop(factory.spec)
    optimizers = agent.configure_optimizers()
    agent.optimizers = lambda *args, **kwargs: optimizers  # type: ignore[method-assign, assignment]
    agent.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign, misc]
    while True:
        batch = replay.sample()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
            agent.training_step(batch)
        yield


def loop(precision: Precision, agent_steps: int) -> Seconds:
    """A fit of so many updates, but for the first few."""
    data = TimedData(
        DMControl("cartpole-swingup", 72, rendering="fast"),
        max_env_steps=(WARMUP + agent_steps) * REPEAT, batch_size=64, replay_capacity=5000,
        warmup_agent_steps=WARMUP,
    )  # fmt: skip
    model = agent_of_loop(data.spec)
    clock = _Clock(data.seconds)
    trainer = L.Trainer(
        precision=precision, accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=[clock],
        log_every_n_steps=50,
    )  # fmt: skip
    trainer.fit(model, data)
    return Seconds(**{name: value / clock.updates for name, value in clock.seconds.items()})


@dataclass
class Seconds:
    """Wall seconds a step of the loop.

    Attributes:
        whole: All of it.
        stream: In the data's stream: collection and sampling.
        step: In the module's `training_step`.
        backward: In `manual_backward`.
        own_backward: Of that in the backward pass itself.
        optimizer: In the `step` of the optimizer that Lightning has wrapped.
        own_optimizer: Of that in the optimizer's own.
        sample: Of the stream's in sampling.
    """

    whole: float = 0.0
    stream: float = 0.0
    step: float = 0.0
    backward: float = 0.0
    own_backward: float = 0.0
    optimizer: float = 0.0
    own_optimizer: float = 0.0
    sample: float = 0.0

    @property
    def lightning(self) -> float:
        """What Lightning takes."""
        inside = self.backward - self.own_backward + self.optimizer - self.own_optimizer
        return self.whole - self.stream - self.step + inside

    @property
    def update(self) -> float:
        """The update, sampling included."""
        return self.step + self.sample


class TimedData(ExperienceData):
    """The data, whose stream is timed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: Counter[str] = Counter()

    def stream(self) -> Iterator[TensorDictBase]:
        """As it is, item by item."""
        items = super().stream()
        following = timed(lambda: next(items, None), self.seconds, "stream")
        while (item := following()) is not None:
            yield item


class _Clock(L.Callback):
    """Times what Lightning calls, from the first updates on."""

    def __init__(self, seconds: Counter[str]) -> None:
        self.seconds: dict[str, float] = {}
        self.updates = 0
        self._running = seconds
        self._begun: tuple[float, dict[str, float], int] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put clocks around the step, the backward pass and the optimizer's step, and around Lightning's of these."""
        wrapped = pl_module.optimizers()[0]  # type: ignore[index]
        for name, owner, function in (
            ("step", pl_module, "training_step"),
            ("backward", pl_module, "manual_backward"), ("own_backward", pl_module, "backward"),
            ("optimizer", wrapped, "step"), ("own_optimizer", trainer.optimizers[0], "step"),
        ):  # fmt: skip
            setattr(owner, function, timed(getattr(owner, function), self._running, name))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Begin after the first updates; note what has passed since."""
        assert isinstance(pl_module, SACModule)
        now, updates = time.perf_counter(), pl_module.counters.grad_steps
        running = {**self._running, "sample": pl_module.times.seconds.get("sample", 0.0)}
        if self._begun is None and updates == 10:
            self._begun = now, running, updates
        elif self._begun is not None:
            start, before, first = self._begun
            self.seconds = {name: running[name] - before[name] for name in running} | {"whole": now - start}
            self.updates = updates - first


def timed(function: Callable[..., Any], seconds: Counter[str], name: str) -> Callable[..., Any]:
    """A function whose wall seconds are added up under a name."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - start  # type: ignore[assignment]

    return call


def in_turns(
    ways: dict[str, Iterator[None]],
    blocks: int,
    block: int,
    clock: Callable[[], float] = time.process_time,
    average: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Seconds of an agent step by a clock, each way a block in turn, and the average over the blocks."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(blocks + 1):
        for name, way in ways.items():
            start = clock()
            for _ in range(block):
                next(way)
            if turn:  # the first warms up
                seconds[name].append((clock() - start) / block)
    return {name: average(values) for name, values in seconds.items()}


def compare(size: int, rendering: Literal["rad", "fast"], blocks: int, block: int) -> None:
    """Print a table row for each way."""
    ways: dict[str, Callable[[], Iterator[None]]] = {
        "bare dm_control": lambda: bare(size, rendering),
        "collector": lambda: collected(size, rendering, store=False),
        "collector, stored": lambda: collected(size, rendering, store=True),
    }
    seconds = in_turns({name: way() for name, way in ways.items()}, blocks, block)
    for name, value in seconds.items():
        share = seconds["bare dm_control"] / value
        print(f"| {size}, {rendering} | {name} | {1000 * value:.2f} | {1 / value:.0f} | {share:.2f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=at_least(2), default=7)
    parser.add_argument("--steps", type=at_least(1), default=40, help="agent steps of a block")
    parser.add_argument("--loop_steps", type=at_least(20), default=150, help="agent steps of the loop")
    parser.add_argument("--pairs", type=at_least(1), default=5, help="times that loop and parts are taken in turns")
    arguments = parser.parse_args()
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    torch.manual_seed(0)
    print(f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(
        "| pictures | way | processor ms an agent step | agent steps a processor second | share of bare |\n"
        "|---|---|---|---|---|"
    )
    compare(100, "rad", arguments.blocks, max(1, arguments.steps // 4))
    compare(72, "fast", arguments.blocks, arguments.steps)
    print(
        "\n| the loop, wall ms an agent step | collection | update | both | both, step by step | the loop "
        "| both / loop | step by step / loop | Lightning's | that / update |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for precision in PRECISIONS:
        # The machine's own speed drifts, so both are taken in turns, too, and a ratio is the median over pairs.
        pairs = [
            (alone(precision, arguments.blocks // 2, arguments.steps), loop(precision, arguments.loop_steps))
            for _ in range(arguments.pairs)
        ]
        print(f"| {precision} | {' | '.join(_row(pairs))} |", flush=True)


def _row(pairs: list[tuple[dict[str, tuple[float, float]], Seconds]]) -> Iterator[str]:
    """Medians over pairs; of the ratios also least and most."""
    median = statistics.median
    for name in ("collection", "update"):
        yield f"{1000 * median(parts[name][0] for parts, _ in pairs):.2f}"
    both = [[sum(times) for times in zip(*parts.values(), strict=True)] for parts, _ in pairs]
    for i in (0, 1):
        yield f"{1000 * median(sums[i] for sums in both):.2f}"
    yield f"{1000 * median(seconds.whole for _, seconds in pairs):.2f}"
    for i in (0, 1):
        ratios = [sums[i] / seconds.whole for sums, (_, seconds) in zip(both, pairs, strict=True)]
        yield f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    yield f"{1000 * median(seconds.lightning for _, seconds in pairs):.2f}"
    yield f"{median(seconds.lightning / seconds.update for _, seconds in pairs):.1%}"


if __name__ == "__main__":
    as_covr_runs()
    main()
