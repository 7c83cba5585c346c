"""Driving: scenarios as data, one environment, two simulators (the built-in road and CARLA)."""

from covr_lightning.envs.driving.carla import Carla
from covr_lightning.envs.driving.env import DrivingEnv, DrivingFactory
from covr_lightning.envs.driving.road import Road
from covr_lightning.envs.driving.scenario import Scenario, load_scenario, shipped_scenarios

__all__ = ["Carla", "DrivingEnv", "DrivingFactory", "Road", "Scenario", "load_scenario", "shipped_scenarios"]
