"""The built-in road as it is named in a YAML."""

from __future__ import annotations

from covr_lightning.envs.driving.env import DrivingFactory
from covr_lightning.envs.driving.simulator import DrivingSimulator
from covr_lightning.rendering import choose_backend


class Road(DrivingFactory):
    """A driving scenario on the built-in MuJoCo road. Its settings are :class:`DrivingFactory`'s."""

    def simulator(self, seed: int) -> DrivingSimulator:
        """Build the road.

        Args:
            seed: Of starts, traffic, pedestrians, paints and scenery.
        """
        choose_backend()  # before MuJoCo is imported
        from covr_lightning.envs.driving.road.simulator import RoadSimulator

        return RoadSimulator(self.scenario, seed)
