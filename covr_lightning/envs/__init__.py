"""What the agent acts in."""

from covr_lightning.envs.base import EnvFactory, EnvSpec, PixelEnv
from covr_lightning.envs.dmc import ACTION_REPEAT, TASKS, DMControl, DMControlEnv

__all__ = ["ACTION_REPEAT", "TASKS", "DMControl", "DMControlEnv", "EnvFactory", "EnvSpec", "PixelEnv"]
