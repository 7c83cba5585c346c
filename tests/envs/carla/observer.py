"""Says who and what is on a server: ``python -m tests.envs.carla.observer PORT``. Imports little, to start fast."""

from __future__ import annotations

import json
import sys
from typing import Any


def observe(port: int) -> dict[str, Any]:
    """Types of all actors, and the settings, as a client sees them that has nothing to do with ours."""
    import carla

    client = carla.Client("127.0.0.1", port)
    client.set_timeout(10.0)
    world = client.get_world()
    settings = world.get_settings()
    return {"actors": [actor.type_id for actor in world.get_actors()], "synchronous": settings.synchronous_mode}


if __name__ == "__main__":
    print(json.dumps(observe(int(sys.argv[1]))))
