"""CARLA's traffic manager in a process of its own.

The traffic manager lives in the client's process and aborts it when the server dies (its thread throws). Here it takes
only this small process with it. This file is run as a script and imports nothing of the package, to start fast.

It reads one JSON object per line and answers each with one that has the same id:
    {"id": 1, "do": "drive", "seed": 3, "lane_changes": false, "gap": 2.5, "kmh": {"<actor id>": 30.0}}  ->  {"id": 1}
    {"id": 2, "do": "tick"}  ->  {"id": 2, "frame": 812}
    {"id": 3, "do": "rest"}  ->  {"id": 3}
It says {"id": 0} when it is ready. An answer with "error" says what went wrong. The end of the input ends it.
"""

import json
import signal
import sys

#: How long the manager may take to end.
END_SECONDS = 5


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
        self.timeout_seconds = timeout_seconds
        self.client = carla.Client(host, port)
        self.client.set_timeout(timeout_seconds)
        self.world = self.client.get_world()
        self.manager = self.client.get_trafficmanager(tm_port)
        self.manager.set_synchronous_mode(True)
        self.vehicles: list = []
        self._first_tick(timeout_seconds)

    def _first_tick(self, timeout_seconds: float, tries: int = 4) -> None:
        """See the world's state once; the first tick may be missed, while the client still subscribes to it."""
        for i in range(tries):
            try:
                self.world.tick(timeout_seconds / tries)
                return
            except RuntimeError:
                if i == tries - 1:
                    raise

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
        return {"frame": self.world.tick(self.timeout_seconds)}

    def rest(self) -> dict:
        """Let go of all vehicles, before they are destroyed."""
        for vehicle in filter(lambda v: v.is_alive, self.vehicles):
            vehicle.set_autopilot(False, self.tm_port)
        self.vehicles = []
        return {}


def main() -> None:
    """Serve standard input."""
    host, port, tm_port, timeout_seconds = sys.argv[1:]
    number = 0
    try:
        autopilot = Autopilot(host, int(port), int(tm_port), float(timeout_seconds))
        print(json.dumps({"id": number}), flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            number = request.pop("id")
            answer = getattr(autopilot, request.pop("do"))(**request)
            print(json.dumps({"id": number, **answer}), flush=True)
        # Or the server would send the next manager on this port to look for this one. The alarm ends this process if
        # that never returns: the server may be gone.
        signal.alarm(END_SECONDS)
        autopilot.manager.shut_down()
    except RuntimeError as error:
        print(json.dumps({"id": number, "error": str(error)}), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    import os

    main()
    # The traffic manager's threads make an orderly exit abort now and then.
    os._exit(0)
