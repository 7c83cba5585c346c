"""The driven car's sensors. They report from threads of the client's library; here each report finds its tick.

An image of a tick may come after the tick's answer, so it is waited for. Collisions come over a connection of their own
and could come later still; one that does is counted in the next tick rather than lost.
"""

from __future__ import annotations

import math
import queue
import time
from typing import Any

import numpy as np

from covr_lightning.envs.driving.scenario import Camera
from covr_lightning.envs.driving.simulator import SimulatorLost


class FrontCamera:
    """The RGB camera.

    Args:
        actor: The sensor.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._images: queue.SimpleQueue[Any] = queue.SimpleQueue()
        actor.listen(self._images.put)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for any picture; it is left for :meth:`picture`.

        Returns:
            Whether there is one.
        """
        deadline = time.monotonic() + timeout_seconds
        while self._images.empty():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def picture(self, frame: int, timeout_seconds: float) -> np.ndarray:
        """The picture of exactly this frame; older ones are thrown away.

        Returns:
            (H, W, 3) uint8 RGB.

        Raises:
            SimulatorLost: It has not come in time, or a newer one came.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                image = self._images.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise SimulatorLost(f"the camera gave no picture of frame {frame} in {timeout_seconds:g} s") from None
            if image.frame == frame:
                bgra = np.frombuffer(image.raw_data, np.uint8).reshape(image.height, image.width, 4)
                return np.ascontiguousarray(bgra[..., 2::-1])
            if image.frame > frame:
                raise SimulatorLost(f"frame {image.frame} came instead of {frame}: somebody else ticks this server")


class CollisionSensor:
    """Sums collision impulses.

    Args:
        actor: The sensor.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._events: queue.SimpleQueue[tuple[int, float, int]] = queue.SimpleQueue()
        actor.listen(self._report)

    def _report(self, event: Any) -> None:
        push, other = event.normal_impulse, event.other_actor
        norm = math.sqrt(push.x**2 + push.y**2 + push.z**2)
        self._events.put((event.frame, norm, other.id if other is not None else 0))

    def impulse(self, frame: int) -> tuple[float, set[int]]:
        """All collisions up to this frame that have not been asked for yet.

        Returns:
            Sum of their impulses (N·s), and ids of the actors that were hit.
        """
        total, hit, later = 0.0, set(), []
        while not self._events.empty():
            event = self._events.get()
            if event[0] <= frame:
                total += event[1]
                hit.add(event[2])
            else:
                later.append(event)
        for event in later:
            self._events.put(event)
        return total, hit


class LaneInvasionSensor:
    """Counts crossed lane markings.

    The client's library computes them itself from each snapshot of the world, before it calls who listens to snapshots;
    so once the snapshot of a tick has been announced here, the tick's markings have been, too.

    Args:
        actor: The sensor.
        world: Its world.
    """

    def __init__(self, actor: Any, world: Any) -> None:
        self.actor = actor
        self._world = world
        self._markings: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._snapshots: queue.SimpleQueue[int] = queue.SimpleQueue()
        actor.listen(lambda event: self._markings.put(len(event.crossed_lane_markings)))
        self._callback = world.on_tick(lambda snapshot: self._snapshots.put(snapshot.frame))

    def crossed(self, frame: int, timeout_seconds: float) -> int:
        """Markings crossed up to this frame that have not been asked for yet.

        Raises:
            SimulatorLost: The snapshot has not come in time.
        """
        deadline = time.monotonic() + timeout_seconds
        try:
            while self._snapshots.get(timeout=max(0.0, deadline - time.monotonic())) < frame:
                pass
        except queue.Empty:
            raise SimulatorLost(f"no snapshot of frame {frame} in {timeout_seconds:g} s") from None
        total = 0
        while not self._markings.empty():
            total += self._markings.get()
        return total

    def stop(self) -> None:
        """Listen to snapshots no more."""
        self._world.remove_on_tick(self._callback)


def camera_attributes(camera: Camera) -> dict[str, str]:
    """The scenario's camera as attributes of CARLA's blueprint."""
    return {
        "image_size_x": str(camera.size),
        "image_size_y": str(camera.size),
        "fov": str(camera.fov),
        "sensor_tick": "0.0",
        "gamma": str(camera.gamma),
        "iso": str(camera.iso),
        "exposure_mode": "histogram",
        "exposure_min_bright": str(camera.exposure_min_bright),
        "exposure_max_bright": str(camera.exposure_max_bright),
        "motion_blur_intensity": str(camera.motion_blur),
    }
