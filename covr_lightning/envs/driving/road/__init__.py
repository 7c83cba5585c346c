"""The built-in road: geometry, traffic, contact and pictures, without any server."""

from covr_lightning.envs.driving.road.factory import Road

__all__ = ["Road"]
