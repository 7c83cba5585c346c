"""Starts one loopback server: ``python -m tests.envs.carla.loopback --port 0 --scenario highway``."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def skip_torch() -> None:
    """Put empty packages in the place of those that import torch: a server starts in half a second instead of four."""
    import covr_lightning

    folder = Path(next(iter(covr_lightning.__path__)))
    for part in ("envs", "envs/driving", "envs/driving/road"):
        name = "covr_lightning." + part.replace("/", ".")
        spec = spec_from_file_location(name, folder / part / "__init__.py")
        assert spec
        sys.modules[name] = module_from_spec(spec)  # its own code never runs


def listen(port: int) -> list[socket.socket]:
    """Three consecutive ports, as many as CARLA takes; any free ones for port 0."""
    for _ in range(50):
        sockets = [socket.create_server(("127.0.0.1", port))]
        first = sockets[0].getsockname()[1]
        try:
            return sockets + [socket.create_server(("127.0.0.1", first + i)) for i in (1, 2)]
        except OSError:
            sockets[0].close()
            if port:
                raise
    raise OSError("no three consecutive free ports")


def main() -> None:
    """Parse the command line and serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--scenario", default="highway")
    parser.add_argument("--lag-seconds", type=float, default=0.0, help="images come later than the tick")
    parser.add_argument("--release", default="0.9.16")
    parser.add_argument("--picture", choices=["plain", "road"], default="plain")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    skip_torch()
    from covr_lightning.envs.driving.scenario import load_scenario
    from tests.envs.carla.loopback.painter import Painter, PlainPainter, RoadPainter
    from tests.envs.carla.loopback.server import LoopbackServer

    scenario = load_scenario(arguments.scenario)
    painter: Painter = RoadPainter(scenario) if arguments.picture == "road" else PlainPainter()
    rpc, stream, _unused = listen(arguments.port)
    server = LoopbackServer(scenario, rpc, stream, painter, arguments.lag_seconds, arguments.release)
    print("ready", rpc.getsockname()[1], flush=True)
    server.run()


if __name__ == "__main__":
    main()
