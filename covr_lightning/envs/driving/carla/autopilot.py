"""CARLA's traffic manager in a process of its own.

The traffic manager lives in the client's process and aborts it when the server dies (its thread throws). Here it takes
only this small process with it. This file is run as a script and imports nothing of the package, to start fast.

It reads one JSON object per line and answers each with one:
    {"do": "drive", "seed": 3, "lane_changes": false, "gap": 2.5, "kmh": {"<actor id>": 30.0}}  ->  {}
    {"do": "tick"}  ->  {"frame": 812}
    {"do": "rest"}  ->  {}
An answer with "error" says what went wrong. The end of the input ends it.
"""

import json
import sys


class Autopilot:
    """The traffic manager and the vehicles it drives.

    Args:
        host: The server.
        port: The server.
        tm_port: Port of the traffic manager.
        timeout_seconds: Of every call.
    """

    def __init__(self, host: str, port: int, tm_port: int, timeout_seconds: float) -> None:
        import carla

        self.tm_port = tm_port
        self.client = carla.Client(host, port)
        self.client.set_timeout(timeout_seconds)
        self.world = self.client.get_world()
        self.manager = self.client.get_trafficmanager(tm_port)
        self.manager.set_synchronous_mode(True)
        self.vehicles: list = []

    def drive(self, seed: int, lane_changes: bool, gap: float, kmh: dict[str, float]) -> dict:
        """Drive these vehicles, each at its own speed."""
        self.manager.set_random_device_seed(seed)
        self.manager.set_global_distance_to_leading_vehicle(gap)
        self.vehicles = list(self.world.get_actors([int(actor) for actor in kmh]))
        for vehicle in self.vehicles:
            vehicle.set_autopilot(True, self.tm_port)
            self.manager.auto_lane_change(vehicle, lane_changes)
            self.manager.set_desired_speed(vehicle, kmh[str(vehicle.id)])
        return {}

    def tick(self) -> dict:
        """One tick of the server, then the controls for the next."""
        return {"frame": self.world.tick()}

    def rest(self) -> dict:
        """Let go of all vehicles, which must still exist."""
        for vehicle in self.vehicles:
            vehicle.set_autopilot(False, self.tm_port)
        self.vehicles = []
        return {}


def main() -> None:
    """Serve standard input."""
    host, port, tm_port, timeout_seconds = sys.argv[1:]
    try:
        autopilot = Autopilot(host, int(port), int(tm_port), float(timeout_seconds))
        print(json.dumps({}), flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            answer = getattr(autopilot, request.pop("do"))(**request)
            print(json.dumps(answer), flush=True)
    except RuntimeError as error:
        print(json.dumps({"error": str(error)}), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    import os

    main()
    # The traffic manager's threads make an orderly exit abort now and then.
    os._exit(0)
