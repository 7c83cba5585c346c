"""Driving scenarios on a CARLA server."""

from covr_lightning.envs.driving.carla.factory import Carla
from covr_lightning.envs.driving.carla.server import CarlaServer
from covr_lightning.envs.driving.carla.simulator import CarlaSimulator

__all__ = ["Carla", "CarlaServer", "CarlaSimulator"]
