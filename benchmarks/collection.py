"""Collection against bare dm_control, and the training loop against the sum of its parts.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.collection

Cartpole-swingup with action repeat 8 and random actions. Bare: ``suite.load``, eight steps, one picture, nothing else.
Collector: the same by TorchRL's collector over this package's environment, with stacks of three frames. Stored: and
each transition written into the replay and counted, as a run does in its warm-up. They take turns in blocks of a few
dozen agent steps; a figure is the median over blocks of the processor time of all threads, the renderer's included,
which other work on the machine hardly changes.

The loop: ``Trainer.fit`` with the settings of dmc_cartpole_swingup_cpu.yaml and learning_cpu's, an update per agent
step, in float32 and in bfloat16, by wall clock. Beside it collection (acting and storing included) and update (sampling
included) by themselves, without Lightning, in turns: the loop is to take what both take. What else it takes is read off
its own clock (:mod:`covr_lightning.step_times`): what is neither collection nor update is Lightning's, and ours between
the two. Nothing here overlaps: rendering and updates both take all cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from torchrl.data import TensorDictReplayBuffer

from covr_lightning.agent import RandomCrop, SACModule
from covr_lightning.allocator import keep_freed_memory
from covr_lightning.counters import Counters
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
#: What of a run's clock is collection.
COLLECTION = ("environment", "render", "act", "store", "label")


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
    factory, counters = DMControl("cartpole-swingup", size, rendering=rendering), Counters()
    collection = OneCollector()
    acting = agent(factory.spec) if agent else SACModule(factory.spec, hidden=8, filters=4)
    policy = ExplorationPolicy(acting, 1, counters, warmup_agent_steps=WARMUP if agent else 10**9)
    collection.open(factory, policy, range(1), 0)
    data = ExperienceData(factory)
    if replay is None:  # one that is empty is false
        replay = TensorDictReplayBuffer(storage=FrameStackStorage(5000, 3), batch_size=64)
    data.experience = Experience(
        replay, None, None, ReplayParts(Path("never written")), range(1), data.counters, acting.prior, acting.finite,
        data.listeners, acting.times,
    )  # fmt: skip
    data.trainer = SimpleNamespace(lightning_module=acting)  # type: ignore[assignment]
    for item in collection.batches():
        if store:
            data._store(item)
        yield


def agent_of_loop(spec: EnvSpec) -> SACModule:
    """The agent of dmc_cartpole_swingup_cpu.yaml."""
    return SACModule(spec, augmentation=RandomCrop(64), hidden=256, strides=(2, 2, 1, 1))


def alone(precision: Precision, blocks: int, block: int) -> dict[str, float]:
    """Wall seconds an agent step of collection and of update, each by itself and without Lightning."""
    collection = collected(72, "fast", store=True, agent=agent_of_loop)
    for _ in range(WARMUP):
        next(collection)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
        ways = {"collection": collection, "update": updates()}
        return in_turns(ways, blocks, block, time.perf_counter)


def updates() -> Iterator[None]:
    """An update per item, on a replay of random actions."""
    factory = DMControl("cartpole-swingup", 72, rendering="fast")
    replay = TensorDictReplayBuffer(storage=FrameStackStorage(5000, 3), batch_size=64)
    for _ in zip(range(WARMUP + 200), collected(72, "fast", store=True, replay=replay), strict=False):
        pass
    agent = agent_of_loop(factory.spec)
    optimizers = agent.configure_optimizers()
    agent.optimizers = lambda *args, **kwargs: optimizers  # type: ignore[method-assign, assignment]
    agent.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign, misc]
    while True:
        agent.training_step(replay.sample())
        yield


def loop(precision: Precision, agent_steps: int) -> dict[str, float]:
    """Seconds of each part of a fit, of its whole, and the number of its updates."""
    data = ExperienceData(
        DMControl("cartpole-swingup", 72, rendering="fast"),
        max_env_steps=(WARMUP + agent_steps) * REPEAT, batch_size=64, replay_capacity=5000,
        warmup_agent_steps=WARMUP,
    )  # fmt: skip
    model = agent_of_loop(data.spec)
    clock = _Clock()
    trainer = L.Trainer(
        precision=precision, accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=[clock],
        log_every_n_steps=50,
    )  # fmt: skip
    trainer.fit(model, data)
    return clock.seconds


class _Clock(L.Callback):
    """Reads the run's clock from the first update on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun: tuple[float, dict[str, float]] | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Begin after the first updates; note what has passed since."""
        assert isinstance(pl_module, SACModule)
        now, parts, updates = time.perf_counter(), pl_module.times.seconds, pl_module.counters.grad_steps
        if self._begun is None and updates == 10:
            self._begun = now, dict(parts)
        elif self._begun is not None:
            self.seconds = {name: parts[name] - self._begun[1].get(name, 0.0) for name in parts}
            self.seconds |= {"whole": now - self._begun[0], "updates": updates - 10}


def in_turns(
    ways: dict[str, Iterator[None]], blocks: int, block: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of an agent step by a clock, each way a block in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(blocks + 1):
        for name, way in ways.items():
            start = clock()
            for _ in range(block):
                next(way)
            if turn:  # the first warms up
                seconds[name].append((clock() - start) / block)
    return {name: statistics.median(values) for name, values in seconds.items()}


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
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40, help="agent steps of a block")
    parser.add_argument("--loop_steps", type=int, default=300, help="agent steps of the loop")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    print(f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(
        "| pictures | way | processor ms an agent step | agent steps a processor second | share of bare |\n"
        "|---|---|---|---|---|"
    )
    compare(100, "rad", arguments.blocks, max(1, arguments.steps // 4))
    compare(72, "fast", arguments.blocks, arguments.steps)
    print("\n| the loop, wall ms an agent step | collection alone | update alone | both | the loop | both / loop "
          "| of which neither, by its own clock | that / its update |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for precision in PRECISIONS:
        by_itself = alone(precision, arguments.blocks, arguments.steps)
        seconds = loop(precision, arguments.loop_steps)
        number, whole = seconds.pop("updates"), seconds.pop("whole")
        update = sum(seconds.get(name, 0.0) for name in ("sample", "critic", "actor", "objectives", "targets"))
        neither = whole - update - sum(seconds.get(name, 0.0) for name in COLLECTION)
        ms = [1000 * value for value in (by_itself["collection"], by_itself["update"])]
        ms += [sum(ms), 1000 * whole / number]
        row = [precision, *(f"{m:.2f}" for m in ms), f"{ms[2] / ms[3]:.2f}", f"{1000 * neither / number:.2f}"]
        print(f"| {' | '.join(row)} | {neither / update:.1%} |", flush=True)


if __name__ == "__main__":
    main()
