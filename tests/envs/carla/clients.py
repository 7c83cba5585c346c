"""What client processes do: ``python -m tests.envs.carla.clients NAME '{"argument": …}'`` prints the result as JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from covr_lightning.envs.driving import DrivingEnv
from covr_lightning.envs.driving.carla import Carla, CarlaServer, CarlaSimulator
from covr_lightning.envs.driving.carla import connection as carla_connection
from covr_lightning.envs.driving.carla import server as carla_server
from covr_lightning.envs.driving.carla.connection import QUIET_SECONDS
from covr_lightning.envs.driving.carla.server import group_lives
from covr_lightning.errors import ConfigError, EnvironmentLost
from tests.envs.carla.observer import observe
from tests.envs.carla.processes import MIXED

FAST = {"timeout_seconds": 10.0, "action_repeat": 1}


def say(what: object) -> None:
    """Print one line of JSON."""
    print(json.dumps(what), flush=True)


def simulator_of(env: DrivingEnv) -> CarlaSimulator:
    """The environment's simulator."""
    assert isinstance(env.simulator, CarlaSimulator)
    return env.simulator


def step(env: DrivingEnv, steer: float, throttle: float) -> dict[str, Any]:
    """One step; reward and flags as plain values."""
    action = torch.tensor([steer, throttle])
    after = env.step(env.fake_tensordict().set("action", action))["next"]
    return {key: after[key].item() for key in ("reward", "done", "terminated", "truncated")}


def frame_number(picture: np.ndarray) -> int:
    """The frame that the loopback's plain picture carries in its first pixel."""
    red, green, blue = (int(x) for x in picture[0, 0])
    return blue + (green << 8) + (red << 16)


def episode(port: int) -> dict[str, Any]:
    """200 steps among traffic: over a marking and back, then into the van."""
    env = Carla(MIXED, port=port, **FAST).make(1)
    env.reset()
    simulator = simulator_of(env)
    cast = simulator._cast
    assert cast
    world = simulator.connection.world
    traffic = world.get_actors(list(cast.speeds))
    walker = cast.walkers[0].actor
    starts, waits = [a.get_location() for a in traffic], walker.get_location()
    lags, same, last, steps, impulses, views = 0, 0, simulator.frame(), [], [], []
    for i in range(200):
        # The road is straight and CARLA's y grows to the right: the middle of lane 2 is at y = 5.25.
        goal = 5.25 + (2.5 * np.sin(2 * np.pi * i / 60) if i < 60 else 0.0)
        turn = views[-1].heading_error if views else 0.0
        steps.append(step(env, 0.4 * (goal - cast.ego.get_location().y) - 1.5 * turn, 0.3))
        impulses.append(env.episode_metrics()["collision"])
        views.append(simulator.view())
        picture, speed = simulator.frame(), views[-1].speed
        lags += frame_number(picture) != world.get_snapshot().frame
        same += speed > 0.1 and np.array_equal(picture, last)
        last = picture
    result = {
        "lags": lags,
        "same": int(same),
        "metrics": env.episode_metrics(),
        "terminated": [i for i, s in enumerate(steps) if s["terminated"]],
        "rewards": [s["reward"] for s in steps],
        "impulses": impulses,
        "heading_errors": [v.heading_error for v in views],
        "offsets": [v.lane_offset for v in views],
        "gaps": [v.gap for v in views],
        "traffic_metres": [a.get_location().distance(b) for a, b in zip(traffic, starts, strict=True)],
        "traffic_speeds": [a.get_velocity().length() for a in traffic],
        "liked_speeds": [cast.speeds[a.id] for a in traffic],
        "walker_metres": walker.get_location().distance(waits),
        "camera": dict(cast.camera.actor.attributes) if cast.camera else {},
        "pixels": list(env.reset()["pixels"].shape),
    }
    env.close()
    env.close()
    return result | {"left": observe(port)}


def reports(port: int, places: dict[str, list[float]]) -> dict[str, Any]:
    """What a tick says of a car that drives straight on at x, y on the mixed scenario's straight."""
    import carla

    env = Carla(MIXED, port=port, **FAST).make(1)
    env.reset()
    simulator = simulator_of(env)
    assert simulator._cast
    for _ in range(10):
        simulator.tick(0.0, 1.0)
    found = {}
    for name, (x, y) in places.items():
        simulator._cast.ego.set_transform(carla.Transform(carla.Location(x=x, y=y)))
        simulator.tick(0.0, 1.0)
        found[name] = asdict(simulator.tick(0.0, 1.0)) | asdict(simulator.view())
    env.close()
    return found


def road_picture(port: int, scenario: str) -> dict[str, Any]:
    """Mean colours of the picture's upper and lower thirds, and whether it moves."""
    env = Carla(scenario, port=port, **FAST).make(1)
    env.reset()
    first = env.simulator.frame()
    for _ in range(40):
        step(env, 0.0, 1.0)
    last = env.simulator.frame()
    third = len(last) // 3
    env.close()
    return {
        "sky": last[:third].mean((0, 1)).tolist(),
        "road": last[-third:].mean((0, 1)).tolist(),
        "moved": float(np.abs(last.astype(float) - first).mean()),
    }


def resets(port: int, count: int) -> dict[str, Any]:
    """Actors on the server after each of many resets, and after closing."""
    env = Carla(MIXED, port=port, **FAST).make(1)
    counts = []
    for _ in range(count):
        env.reset()
        step(env, 0.0, 1.0)
        counts.append(len(simulator_of(env).connection.world.get_actors()))
    env.close()
    return {"counts": counts, "left": observe(port)}


def starts(port: int, seeds: list[int]) -> list[list[list[float]]]:
    """For each seed, where everybody stands at the first two starts."""
    return [_two_starts(port, seed) for seed in seeds]


def _two_starts(port: int, seed: int) -> list[list[float]]:
    env = Carla(MIXED, port=port, **FAST).make(seed)
    places = []
    for _ in range(2):
        env.reset()
        simulator = simulator_of(env)
        assert simulator._cast
        actors = [a for a in simulator.connection.world.get_actors(simulator._cast.actors) if "sensor" not in a.type_id]
        places.append([round(x, 3) for a in actors for x in (a.get_location().x, a.get_location().y)])
    env.close()
    return places


def killed(root: str, times: int) -> dict[str, Any]:
    """The server dies in mid-episode, again and again."""
    env = Carla(MIXED, carla_root=root, timeout_seconds=3.0, action_repeat=1, reconnects=3).make(1)
    cuts, driven = [], []
    for _ in range(times):
        env.reset()
        moved = [step(env, 0.0, 1.0) for _ in range(5)]
        driven.append(moved[-1]["reward"])
        server = simulator_of(env).connection.server
        assert server
        assert server.pid
        os.killpg(server.pid, signal.SIGKILL)
        cuts.append(step(env, 0.0, 1.0))
    env.reset()
    after = step(env, 0.0, 1.0)
    metrics = {"lost": env.lost_episodes, "cuts": cuts, "driven": driven, "after": after}
    pid = server.pid
    assert pid
    env.close()
    return metrics | {"alive": group_lives(pid)}


def hanging(port: int, pid: int) -> dict[str, Any]:
    """The server, with a setting of its own, hangs in mid-episode, and goes on later."""
    other = give_setting_of_its_own(port)
    env = Carla(MIXED, port=port, timeout_seconds=1.5, action_repeat=1, reconnects=3).make(1)
    env.reset()
    step(env, 0.0, 1.0)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    cut = step(env, 0.0, 1.0)
    seconds = time.monotonic() - began
    os.kill(pid, signal.SIGCONT)
    env.reset()
    after = step(env, 0.0, 1.0)
    count = len(simulator_of(env).connection.world.get_actors())
    env.close()
    substeps = other.get_world().get_settings().max_substeps
    return {
        "cut": cut, "seconds": seconds, "after": after, "lost": env.lost_episodes, "count": count, "substeps": substeps,
    }  # fmt: skip


def group_runs(group: int) -> bool:
    """Whether a process of the group has not stopped yet."""
    stats = [path.read_text().rpartition(")")[2].split()[:3] for path in Path("/proc").glob("[0-9]*/stat")]
    return any(int(number) == group and state not in "TZ" for state, _, number in stats)


def frozen(root: str) -> dict[str, Any]:
    """A server of ours hangs in mid-episode."""
    carla_server.END_SECONDS = 0.5
    env = Carla(MIXED, carla_root=root, timeout_seconds=2.0, action_repeat=1, reconnects=3).make(1)
    env.reset()
    server = simulator_of(env).connection.server
    assert server
    assert server.pid
    pid = server.pid
    os.killpg(pid, signal.SIGSTOP)
    while group_runs(pid):
        time.sleep(0.01)  # on a busy machine it may answer one more tick
    cut = step(env, 0.0, 1.0)
    env.reset()
    after = step(env, 0.0, 1.0)
    alive, other = group_lives(pid), server.pid
    env.close()
    return {"cut": cut, "after": after, "alive": alive, "another": other != pid}


def hits_a_walker(port: int) -> dict[str, Any]:
    """Drives fast into the first pedestrian of the ghost-pedestrian scenario, and a second further."""
    env = Carla("ghost_pedestrian", port=port, **FAST).make(1)
    env.reset()
    cast = simulator_of(env)._cast
    assert cast
    walker = cast.walkers[0]
    rewards: list[float] = []
    places: list[float] = []
    hit = begun = -1
    while len(rewards) < 300 and not 0 <= hit < len(rewards) - 20:
        rewards.append(step(env, 0.0, 0.6)["reward"])
        places.append(walker.actor.get_location().y)
        begun = len(rewards) if walker.walking and begun < 0 else begun
        hit = len(rewards) - 1 if rewards[-1] < -1 and hit < 0 else hit
    result = {"walked": abs(places[hit] - places[0]), "planned": walker.speed * 0.05 * (hit - begun)}
    result |= {"after": abs(places[-1] - places[hit]), "hits": sum(r < -1 for r in rewards)}
    result |= {"drives_on": rewards[-1] > 0, "others": [w.walking for w in cast.walkers[1:]]}
    env.close()
    return result


def outlives(port: int) -> dict[str, Any]:
    """Says when it drives, waits until somebody has ended the server, and reconnects."""
    env = Carla(MIXED, port=port, timeout_seconds=2.0, action_repeat=1, reconnects=6).make(1)
    env.reset()
    step(env, 0.0, 1.0)
    say("driving")
    sys.stdin.readline()
    cut = step(env, 0.0, 1.0)
    say("cut")
    env.reset()
    after = step(env, 0.0, 1.0)
    env.close()
    return {"cut": cut, "after": after}


def gone_for_good(port: int) -> str:
    """The server dies and nobody starts it again."""
    env = Carla(MIXED, port=port, timeout_seconds=1.0, action_repeat=1, reconnects=1).make(1)
    env.reset()
    say("driving")
    sys.stdin.readline()
    step(env, 0.0, 1.0)
    try:
        env.reset()
    except EnvironmentLost as error:
        return str(error)
    return ""


def drives_on(port: int, machine: str = "") -> None:
    """Drives until it is interrupted, if asked to as if it were another machine."""
    if machine:
        carla_connection._machine = lambda: machine
    env = Carla(MIXED, port=port, **FAST).make(1)
    while True:
        env.reset()
        step(env, 0.0, 1.0)
        say("driving")
        for _ in range(100):
            step(env, 0.0, 0.0)
            time.sleep(0.01)


def one_driver(port: int) -> dict[str, Any]:
    """Connects, makes one step, and says who is there."""
    env = Carla(MIXED, port=port, **FAST).make(1)
    env.reset()
    after = step(env, 0.0, 1.0)
    count = len(simulator_of(env).connection.world.get_actors())
    env.close()
    return {"after": after, "count": count}


def give_setting_of_its_own(port: int) -> Any:
    """A client that has just given the server seven substeps, which are to be put back."""
    import carla

    client = carla.Client("127.0.0.1", port)
    settings = client.get_world().get_settings()
    settings.max_substeps = 7
    client.get_world().apply_settings(settings)
    return client


def loads_a_town(port: int) -> dict[str, Any]:
    """What the settings were when towns were loaded, and what is left of another client's setting after closing."""
    import carla

    class Watched(carla.Client):
        def load_world(self, *arguments: Any, **options: Any) -> Any:
            before = self.get_world().get_settings().synchronous_mode
            world = super().load_world(*arguments, **options)
            loads.append([before, world.get_settings().synchronous_mode])
            return world

    loads: list[list[bool]] = []
    other = give_setting_of_its_own(port)
    carla.Client = Watched
    env = Carla(MIXED, port=port, **FAST).make(1)
    played = simulator_of(env).connection.map.name
    env.close()
    return {"loads": loads, "map": played, "substeps": other.get_world().get_settings().max_substeps}


def refused(**arguments: Any) -> dict[str, Any]:
    """The sentence with which making an environment is refused."""
    began = time.monotonic()
    try:
        Carla(**arguments).make(1)
    except ConfigError as error:
        return {"error": str(error), "seconds": time.monotonic() - began}
    return {"error": ""}


def two_ports(ports: list[int]) -> dict[str, Any]:
    """Two environments on two servers, in turns; a third one finds no server until one is closed."""
    factory = Carla(MIXED, port=ports, **FAST)
    envs = [factory.make(1), factory.make(2)]
    for env in envs:
        env.reset()
    frames = []
    for i in range(30):
        for env in envs[: 1 if i % 3 else 2]:
            step(env, 0.0, 0.5)
        frames.append([frame_number(env.simulator.frame()) for env in envs])
    used = [simulator_of(env).connection.port for env in envs]
    try:
        factory.make(3)
        error = ""
    except ConfigError as refusal:
        error = str(refusal)
    envs[1].close()
    third = factory.make(3)
    third.reset()
    reused = simulator_of(third).connection.port
    distance = envs[0].episode_metrics()["distance"]
    for env in (envs[0], third):
        env.close()
    return {"frames": frames, "used": used, "error": error, "reused": reused, "distance": distance}


def shared(port: int) -> dict[str, Any]:
    """Training and evaluation take turns on one server."""
    factory = Carla(MIXED, port=port, **FAST)
    training, evaluation = factory.make(1), factory.make(2)
    training.reset()
    first = step(training, 0.0, 1.0)
    evaluation.reset()
    world = simulator_of(training).connection.world
    count = len(world.get_actors())
    other = step(evaluation, 0.0, 1.0)
    cut = step(training, 0.0, 1.0)
    training.reset()
    again = step(training, 0.0, 1.0)
    evaluation.close()
    still = step(training, 0.0, 1.0)
    training.close()
    steps = {"first": first, "other": other, "cut": cut, "again": again, "still": still}
    return steps | {"count": count, "left": observe(port)}


def own_servers(root: str) -> dict[str, Any]:
    """Two servers of ours: ending one leaves the other."""
    one, two = CarlaServer(root), None
    one.start()
    two = CarlaServer(root)
    two.start()
    ports, pids = [one.port, two.port], [one.pid or 0, two.pid or 0]
    one.stop()
    one.stop()
    alive = [group_lives(pid) for pid in pids]
    reachable = observe(two.port)["actors"] == []
    two.stop()
    return {"ports": ports, "alive": alive, "reachable": reachable, "after": [group_lives(pid) for pid in pids]}


def keeps_a_server(root: str) -> None:
    """Starts a server, says its process group, and waits to be killed."""
    server = CarlaServer(root)
    server.start()
    print(json.dumps(server.pid), flush=True)
    while True:
        signal.pause()


def road_map(port: int) -> dict[str, Any]:
    """What the client reads from the loopback's OpenDRIVE text."""
    import carla

    client = carla.Client("127.0.0.1", port)
    client.set_timeout(10.0)
    world = client.get_world()
    settings = world.get_settings()
    settings.synchronous_mode, settings.fixed_delta_seconds = True, 0.05  # or loading crashes the client now and then
    world.apply_settings(settings)
    time.sleep(QUIET_SECONDS)
    found = client.load_world("Town05", reset_settings=False).get_map()
    settings.synchronous_mode, settings.fixed_delta_seconds = False, None
    client.get_world().apply_settings(settings)
    places = {}
    for s in (0.5, 150.0, 350.0, 700.0):
        for lane in (-3, -2, -1, 1):
            waypoint = found.get_waypoint_xodr(3, lane, s)
            where = waypoint.transform
            places[f"{s:g} {lane}"] = [where.location.x, where.location.y, where.rotation.yaw]
    end = found.get_waypoint_xodr(3, -1, 799.0).transform
    places["end"] = [end.location.x, end.location.y, end.rotation.yaw]
    marks = [found.get_waypoint_xodr(3, lane, 10.0).right_lane_marking.type.name for lane in (-1, -2, -3)]
    kinds = []
    for d in (-8.0, -6.0, -4.2, -1.0, 9.0, 11.0, 13.0, 15.0):
        at = found.get_waypoint(carla.Location(x=100.0, y=d), project_to_road=False, lane_type=carla.LaneType.Any)
        kinds.append(at.lane_type.name if at else None)
    beyond = found.get_waypoint_xodr(3, -1, 799.5).next(2.0)
    return {"places": places, "marks": marks, "kinds": kinds, "beyond": len(beyond)}


def main() -> None:
    """Run one of the functions above."""
    say(globals()[sys.argv[1]](**json.loads(sys.argv[2])))


if __name__ == "__main__":
    main()
