"""What the agent acts in."""

from covr_lightning.envs.base import EnvFactory, EnvSpec, PixelEnv
from covr_lightning.envs.carracing import CarRacing, CarRacingEnv
from covr_lightning.envs.dmc import ACTION_REPEAT, TASKS, DMControl, DMControlEnv
from covr_lightning.envs.driving import Carla, DrivingEnv, Road
from covr_lightning.envs.point_reach import PointReach, PointReachEnv

__all__ = [
    "ACTION_REPEAT",
    "TASKS",
    "CarRacing",
    "CarRacingEnv",
    "Carla",
    "DMControl",
    "DMControlEnv",
    "DrivingEnv",
    "EnvFactory",
    "EnvSpec",
    "PixelEnv",
    "PointReach",
    "PointReachEnv",
    "Road",
]
