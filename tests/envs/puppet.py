"""An environment that does as it is told by its actions: it dies, hangs, raises, or waits for others."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from covr_lightning.envs.base import EnvFactory, EnvSpec, PixelEnv
from covr_lightning.errors import ConfigError
from covr_lightning.random_state import generator_state, set_generator_state

PLAIN, EXIT, RAISE, KILL, STOP, SLEEP, MEET = (i / 8 for i in range(7))
EPISODE_STEPS = 4
SIZE = 6


@dataclass
class Puppet(EnvFactory):
    """Builds it, or fails to.

    Attributes:
        at_start: What `make` does instead: ``"exit"`` or ``"config"``.
        folder: Where those that meet leave a file each.
        party: How many meet.
        servant: Start another process in a session of its own, as a simulator's server would be.
    """

    at_start: str = ""
    folder: str = ""
    party: int = 1
    servant: bool = False

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec("puppet", SIZE, SIZE, 2, 1, 1, EPISODE_STEPS)

    def make(self, seed: int) -> PuppetEnv:
        if self.at_start == "exit":
            os._exit(9)
        if self.at_start == "config":
            raise ConfigError("data.env.strings is 0; it must be at least 1.")
        return PuppetEnv(self, seed)


class PuppetEnv(PixelEnv):
    """Its frames hold the episode's number drawn at random, the process's, and the step."""

    def __init__(self, factory: Puppet, seed: int) -> None:
        self.factory = factory
        self.me = seed
        self.episode = self.step_number = 0
        self.servant = None
        if factory.servant:
            self.servant = subprocess.Popen(["sleep", "600"], start_new_session=True)
        super().__init__(factory.spec, seed)

    def simulator_seed(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def random_state(self) -> dict[str, Any]:
        return generator_state(self.rng)

    def set_random_state(self, state: dict[str, Any]) -> None:
        set_generator_state(self.rng, state)

    def simulator_reset(self) -> np.ndarray:
        self.episode, self.step_number = int(self.rng.integers(2**32)), 0
        return self.frame()

    def simulator_step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        told = float(action[0])
        if told == EXIT:
            os._exit(7)
        if told == RAISE:
            raise ArithmeticError("the strings\nare tangled")
        if told in (KILL, STOP):
            os.kill(os.getpid(), signal.SIGKILL if told == KILL else signal.SIGSTOP)
        if told == SLEEP:
            time.sleep(600)
        if told == MEET:
            self.meet()
        self.step_number += 1
        return self.frame(), float(action[0]) + self.step_number, False, self.step_number == EPISODE_STEPS

    def meet(self) -> None:
        """Go on when all are there."""
        folder = Path(self.factory.folder)
        (folder / f"{self.step_number} {self.me}").touch()
        for _ in range(3000):
            if len(list(folder.glob(f"{self.step_number} *"))) == self.factory.party:
                return
            time.sleep(0.01)
        raise TimeoutError("nobody came")

    def frame(self) -> np.ndarray:
        frame = np.zeros((SIZE, SIZE, 3), np.uint8)
        frame[0, :4, 0] = np.frombuffer(np.uint32(self.episode).tobytes(), np.uint8)
        frame[1, 0, 1] = self.step_number
        return frame

    def episode_metrics(self) -> dict[str, float]:
        return {"steps": float(self.step_number), "servant": float(self.servant.pid if self.servant else 0)}

    def close(self, **kwargs: bool) -> None:
        if self.servant is not None:
            self.servant.kill()
            self.servant.wait()
        super().close(**kwargs)
