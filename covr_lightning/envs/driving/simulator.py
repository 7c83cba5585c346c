"""The small protocol between the driving environment and whatever simulates the road."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from covr_lightning.envs.driving.scenario import Scenario


class SimulatorLost(RuntimeError):
    """The simulator died or hangs: the episode cannot go on, but the next reset may bring it back."""


class SimulatorTaken(SimulatorLost):
    """Another environment of this process has taken a shared simulator over; the next reset takes it back."""


@dataclass(frozen=True)
class Tick:
    """What one simulator tick did to the driven car.

    Attributes:
        speed: Speed along the lane's direction after the tick, m/s; v of Eqs. 7 and 8.
        velocity: Speed in any direction, m/s (decides whether the car is stuck).
        collision: Sum of the collision impulses of this tick, N·s.
        lane_invasions: Corners of the car that crossed a lane marking in this tick.
        off_road: The car's middle is on no lane of the road any more.
        end_of_road: There is no road left to drive on.
    """

    speed: float
    velocity: float
    collision: float = 0.0
    lane_invasions: int = 0
    off_road: bool = False
    end_of_road: bool = False


@dataclass(frozen=True)
class RoadView:
    """Where the car is, as a scripted driver sees it.

    Attributes:
        speed: m/s.
        lane_offset: Metres right of the nearest lane's middle.
        heading_error: Radians that the car points to the right of the lane's direction.
        curvature: Of the road at the car, 1/m; positive bends left.
        gap: Metres of free road in the car's path to the nearest vehicle, or pedestrian who is in it or walks into it;
            infinite if there is none.
        gap_speed: That one's speed along the road, m/s; 0 if there is none.
    """

    speed: float
    lane_offset: float
    heading_error: float
    curvature: float
    gap: float
    gap_speed: float


class DrivingSimulator(ABC):
    """Simulates one scenario around one driven car.

    Args:
        scenario: What happens on the road.
        seed: Of everything random.
    """

    #: Whether it does the same again from the same random numbers and actions.
    repeatable: bool

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        #: What resets draw from.
        self.rng = np.random.default_rng(seed)

    def seed(self, seed: int) -> None:
        """Seed everything random; the next reset starts from it."""
        self.rng = np.random.default_rng(seed)

    @abstractmethod
    def reset(self) -> None:
        """Start an episode: everything of the last one is gone, the car stands at its start.

        Raises:
            ConfigError: It could not be brought back.
        """

    @abstractmethod
    def tick(self, steer: float, throttle: float) -> Tick:
        """Advance by `scenario.tick_seconds`.

        Args:
            steer: −1 (left) to 1 (right).
            throttle: Above 0 accelerates; 0 and below brakes, −1 fully.

        Raises:
            SimulatorLost: It died or hangs.
        """

    @abstractmethod
    def frame(self) -> np.ndarray:
        """The camera's picture after the newest tick (or the reset), (size, size, 3) uint8 RGB."""

    @abstractmethod
    def view(self) -> RoadView:
        """Where the car is."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind. Safe to call twice."""
