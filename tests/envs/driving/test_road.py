"""The built-in road as an environment: deterministic, honest about contact, and readable."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from covr_lightning.envs.driving import DrivingEnv, Road
from covr_lightning.envs.driving.drivers import LaneKeepingDriver, RandomDriver
from covr_lightning.envs.driving.road.bodies import CAR
from covr_lightning.envs.driving.road.simulator import RoadSimulator
from covr_lightning.envs.driving.road.track import Pose
from covr_lightning.envs.driving.road.traffic import Vehicle, advance_vehicles
from covr_lightning.envs.driving.scenario import load_scenario, shipped_scenarios
from covr_lightning.envs.driving.simulator import DrivingSimulator, SimulatorLost, SimulatorTaken, Tick
from covr_lightning.errors import ConfigError, EnvironmentLost
from covr_lightning.evaluation import play_episode


@pytest.fixture(scope="module")
def highway() -> DrivingEnv:
    return Road("highway").make(0)


@pytest.fixture(scope="module")
def street() -> DrivingEnv:
    return Road("ghost_pedestrian").make(0)


def simulator(env: DrivingEnv) -> RoadSimulator:
    assert isinstance(env.simulator, RoadSimulator)
    return env.simulator


def step(env: DrivingEnv, *action: float) -> TensorDict:
    return env.step(TensorDict({"action": torch.tensor(action)}))["next"]


def test_specs(highway: DrivingEnv) -> None:
    check_env_specs(highway)
    state = highway.reset()
    assert state["pixels"].shape == (9, 128, 128)
    assert state["pixels"].dtype == torch.uint8
    assert highway.env_spec.task == "highway"
    assert (highway.env_spec.action_dim, highway.env_spec.action_repeat) == (2, 4)


@pytest.mark.parametrize("name", ["highway", "ghost_pedestrian", "highway_b"])
def test_the_seed_decides_everything(name: str) -> None:
    def play(seed: int) -> list:
        env = Road(name).make(seed)
        rng = np.random.default_rng(5)
        out = [env.reset()["pixels"]]
        for _ in range(15):
            state = step(env, *rng.uniform((-0.2, 0.2), (0.2, 1.0)))
            out += [state["pixels"], state["reward"]]
        env.close()
        return out

    first, again, other = play(3), play(3), play(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_seeding_again_starts_again(highway: DrivingEnv) -> None:
    highway.set_seed(7)
    first = highway.reset()["pixels"]
    assert not torch.equal(highway.reset()["pixels"], first)
    highway.set_seed(7)
    assert torch.equal(highway.reset()["pixels"], first)


class Scripted(RoadSimulator):
    """A simulator that hands out prepared ticks."""

    def __init__(self, ticks: list[Tick | Exception]) -> None:
        DrivingSimulator.__init__(self, load_scenario("ghost_pedestrian"), seed=0)
        self.ticks = list(ticks)

    def reset(self) -> None:
        pass

    def tick(self, steer: float, throttle: float) -> Tick:
        tick = self.ticks.pop(0)
        if isinstance(tick, Exception):
            raise tick
        return tick

    def frame(self) -> np.ndarray:
        return np.zeros((128, 128, 3), np.uint8)

    def close(self) -> None:
        pass


TICKS = [Tick(4.0, 4.0), Tick(6.0, 6.0, collision=100.0), Tick(8.0, 8.0, lane_invasions=1), Tick(2.0, 2.0)]


@pytest.mark.parametrize(
    ("reward", "distance", "expected_reward", "expected_distance"),
    [
        # v·dt: 0.2 + 0.3 + 0.4 + 0.1 = 1.0; − 1e-3·100 − 1e-2·1 − 4 · 0.1·0.5 = −0.31.
        ("sum", "integrated", 0.69, 1.0),
        # As the authors' earlier code: 0.69 / 4, and the last tick's 2 m/s · 0.05 s alone.
        ("mean", "last", 0.1725, 0.1),
    ],
)
def test_reward_and_distance_over_the_repeats(
    reward: str, distance: str, expected_reward: float, expected_distance: float
) -> None:
    factory = Road("ghost_pedestrian", repeat_reward=reward, repeat_distance=distance)  # type: ignore[arg-type]
    env = DrivingEnv(factory.spec, Scripted(TICKS), 0, factory.repeat_reward, factory.repeat_distance)
    env.reset()
    assert float(step(env, 0.5, 0.0)["reward"]) == pytest.approx(expected_reward)
    assert env.episode_metrics() == pytest.approx(
        {"distance": expected_distance, "collision": 100.0, "lane_invasions": 1.0}
    )


def test_a_lost_simulator_cuts_the_episode() -> None:
    env = DrivingEnv(Road("ghost_pedestrian").spec, Scripted([TICKS[0], SimulatorLost("gone")]), 0)
    env.reset()
    state = step(env, 0.0, 0.0)
    assert bool(state["truncated"])
    assert not bool(state["terminated"])
    assert float(state["reward"]) == pytest.approx(0.2)  # the tick that was done: 4 m/s · 0.05 s
    assert env.lost_episodes == 1
    assert bool(state["lost"])
    env = DrivingEnv(Road("ghost_pedestrian").spec, Scripted([SimulatorTaken("by the evaluation")]), 0)
    env.reset()
    state = step(env, 0.0, 0.0)
    assert bool(state["truncated"])
    assert bool(state["lost"])  # of the step nothing is known
    assert env.lost_episodes == 0  # cut, but no simulator was lost


def test_a_lost_evaluation_episode_is_played_again() -> None:
    class Still(DrivingEnv):
        def simulator_reset(self) -> np.ndarray:
            self.resets = getattr(self, "resets", 0) + 1
            return super().simulator_reset()

    def policy(pixels: torch.Tensor, deterministic: bool, previous_action: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros(1, 2)

    end = Tick(4, 4, end_of_road=True)
    env = Still(Road("ghost_pedestrian").spec, Scripted([TICKS[0], SimulatorLost("gone"), end]), 0)
    result = play_episode(policy, env, seed=1)
    assert (env.resets, env.lost_episodes, result.agent_steps) == (2, 1, 1)
    assert result.episode_return == pytest.approx(0.2)
    env = Still(Road("ghost_pedestrian").spec, Scripted([SimulatorLost("gone")] * 9), 0)
    with pytest.raises(EnvironmentLost, match="4 evaluation episodes"):
        play_episode(policy, env, seed=1)


def test_an_end_stops_the_repeats() -> None:
    env = DrivingEnv(Road("ghost_pedestrian").spec, Scripted([TICKS[0], Tick(4, 4, off_road=True)]), 0)
    env.reset()
    state = step(env, 0.0, 0.0)
    assert bool(state["terminated"])
    assert env.progress.env_steps == 2


def test_running_into_a_parked_van_stops_the_car(street: DrivingEnv) -> None:
    street.reset()
    sim = simulator(street)
    van = next(v for v in sim.vehicles if v.wanted == 0)
    x, y, heading = sim.track.pose(van.s - van.kind.length / 2 - CAR.length / 2 - 0.1, van.d)
    sim.ego, sim.speed = Pose(x, y, heading), 6.0
    tick = sim.tick(0.0, 0.0)
    # 1800 · 2500 / 4300 kg times a little less than 6 m/s.
    assert tick.collision == pytest.approx(1800 * 2500 / 4300 * 6.0, rel=0.02)
    assert sim.speed == 0.0
    assert sim.tick(0.0, 0.0).collision == 0.0  # stands beside it, touching no more
    for _ in range(15):  # closes the last centimetres
        sim.tick(0.0, 1.0)
    pushes = [sim.tick(0.0, 1.0).collision for _ in range(20)]
    # Every tick now, by the 4 · 0.05 m/s that it gains in one.
    assert pushes == pytest.approx([1800 * 2500 / 4300 * 0.2] * 20)


def test_who_walks_into_a_passing_car_s_side_does_not_stop_it(street: DrivingEnv) -> None:
    street.reset()
    sim = simulator(street)
    walker = sim.pedestrians[0]
    sim.vehicles, sim.pedestrians = [], [walker]
    start, way = walker.crossing.start_d, math.copysign(1.0, walker.crossing.end_d - walker.crossing.start_d)
    # The car's middle is 1.5 m past the walker, who is 3 cm from its side.
    sim.ego, sim.speed = Pose(*sim.track.pose(walker.crossing.s + 1.5, start + way * 1.23)), 8.0
    walker.d, walker.speed, walker.walking = start, 1.3, True
    ticks = [sim.tick(0.0, 0.0) for _ in range(8)]
    assert [tick.collision for tick in ticks if tick.collision] == pytest.approx([1800 * 1.3], rel=0.01)
    assert walker.hit
    assert sim.speed > 7.5


def test_a_hit_pedestrian_stays_and_the_episode_ends(street: DrivingEnv) -> None:
    street.set_seed(0)
    street.reset()
    ended = ""
    for _ in range(100):
        state = step(street, 0.0, 1.0)
        if bool(state["done"]):
            ended = street.progress.ended
            break
    assert ended == "collision"
    assert any(p.hit for p in simulator(street).pedestrians)
    # From 60 m on, at the first of the three places.
    assert 45 < street.episode_metrics()["distance"] < 62


def test_pedestrians_wait_until_the_car_is_near(street: DrivingEnv) -> None:
    street.reset()
    sim = simulator(street)
    first, second, _ = sim.pedestrians
    place = first.crossing.s
    sim.ego, sim.speed = sim.track.pose(place - 60, 2.0), 8.0
    sim.tick(0.0, 0.0)
    assert not first.walking
    sim.ego, sim.speed = sim.track.pose(place - 9, 2.0), 8.0
    sim.tick(0.0, 0.0)
    assert first.walking
    assert not second.walking
    while first.walking:
        first.advance(0.0, 0.0, 0.05)
    assert first.d == first.crossing.end_d


def test_each_corner_of_the_car_counts_once_over_a_marking(highway: DrivingEnv) -> None:
    highway.reset()
    sim = simulator(highway)
    sim.vehicles = []
    start = sim.track.pose(300.0, 1.75)  # middle of lane 1, on the straight
    sim.ego, sim.speed = start._replace(heading=start.heading - 0.3), 8.0
    crossings = sum(sim.tick(0.0, 0.064).lane_invasions for _ in range(30))
    # To the right over the marking at 3.5 m: four corners, each in a tick of its own at this angle.
    end = sim.track.project(sim.ego.x, sim.ego.y)[1]
    assert 3.5 + 1.5 < end < 7 - 1.5
    assert crossings == 4


def test_corners_that_cross_at_once_count_each(highway: DrivingEnv) -> None:
    highway.reset()
    sim = simulator(highway)
    sim.vehicles = []
    start = sim.track.pose(300.0, 0.6)
    sim.ego, sim.speed = start._replace(heading=start.heading - math.pi / 2), 8.0
    crossings = [sim.tick(0.0, 0.064).lane_invasions for _ in range(14)]  # 0.4 m each
    # Across the road, the middle of a car of 4.6 m from 0.6 to 6.2 m: its front goes over the marking at 3.5 m, its
    # rear over that at 0, its front over that at 7, its rear over that at 3.5, two corners each time.
    assert [n for n in crossings if n] == [2, 2, 2, 2]


def test_the_rewards_speed_is_that_along_the_road(highway: DrivingEnv) -> None:
    highway.reset()
    sim = simulator(highway)
    sim.vehicles = []
    start = sim.track.pose(300.0, 7.0)
    for angle in (0.5, math.pi):
        sim.ego, sim.speed = start._replace(heading=start.heading + angle), 8.0
        tick = sim.tick(0.0, 0.064)
        assert tick.velocity == pytest.approx(8.0)
        assert tick.speed == pytest.approx(8.0 * math.cos(angle))


def test_leaving_the_road_ends_it(highway: DrivingEnv) -> None:
    highway.reset()
    sim = simulator(highway)
    sim.vehicles = []
    sim.ego = sim.track.pose(300.0, 4 * 3.5 + 3.4)
    assert not sim.tick(0.0, 0.0).off_road
    sim.ego = sim.track.pose(300.0, 4 * 3.5 + 3.6)
    assert sim.tick(0.0, 0.0).off_road


def test_no_moving_car_is_near_the_start_in_its_lane(highway: DrivingEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    sim = simulator(highway)
    monkeypatch.setattr(sim.scene, "reset", lambda *_: None)
    nearest = math.inf
    for seed in range(300):
        sim.seed(seed)
        sim.reset()
        s, d = sim.track.project(sim.ego.x, sim.ego.y)
        ahead = [v.s - s - CAR.length for v in sim.vehicles if abs(v.d - d) < 0.1 and v.wanted]
        nearest = min([nearest, *ahead])
    assert 8.0 < nearest < 10.0


@pytest.mark.parametrize(
    ("lead", "acceleration"),
    [
        # On a free road 1.5 · (1 − (5/10)⁴).
        (None, 1.40625),
        # 20 m behind one at 3 m/s: g* = 2 + 5 · 1.2 + 5 · 2 / (2 √(1.5 · 2.5)) = 10.581989, so that 1.5 · (g*/20)² =
        # 0.419919 goes off.
        (3.0, 0.986331),
        # Behind one that is faster, g* = 2 + max(0, 6 − 5 · 5 / 3.872983) = 2: 0.015 goes off.
        (10.0, 1.39125),
    ],
)
def test_traffic_follows_the_intelligent_driver_model(lead: float | None, acceleration: float) -> None:
    car = Vehicle(100.0, 1.75, 5.0, 10.0, CAR, 1.75)
    others = [] if lead is None else [Vehicle(120 + CAR.length, 1.75, lead, 10.0, CAR, 1.75)]
    advance_vehicles([car, *others], (0.0, 12.0, 0.0), load_scenario("highway"), 0.05)
    assert car.speed == pytest.approx(5 + 0.05 * acceleration, abs=1e-6)


def test_traffic_keeps_its_distance() -> None:
    scenario = load_scenario("highway")
    fast, slow = Vehicle(100.0, 1.75, 10.0, 10.0, CAR, 1.75), Vehicle(130.0, 1.75, 3.0, 3.0, CAR, 1.75)
    parked_ego = (400.0, 1.75, 0.0)
    least = math.inf
    for _ in range(3000):
        advance_vehicles([fast, slow], parked_ego, scenario, 0.05)
        least = min(least, slow.s - fast.s - CAR.length)
    assert least > 1.0
    assert slow.s < 400 - CAR.length  # the slow one stops behind the driven car
    assert fast.speed < 0.1


def test_traffic_may_change_lanes_when_the_scenario_says_so() -> None:
    from dataclasses import replace

    scenario = load_scenario("highway")
    scenario = replace(scenario, traffic=replace(scenario.traffic, lane_changes=True))
    fast, slow = Vehicle(100.0, 1.75, 10.0, 10.0, CAR, 1.75), Vehicle(130.0, 1.75, 3.0, 3.0, CAR, 1.75)
    for _ in range(600):
        advance_vehicles([fast, slow], (0.0, 12.0, 0.0), scenario, 0.05)
    assert fast.d == 1.75 + 3.5
    assert fast.s > slow.s


def test_pictures_differ_in_the_rain_and_show_the_sky(highway: DrivingEnv) -> None:
    day = simulator(highway)
    day.seed(1)
    day.reset()
    rain = simulator(Road("highway_b").make(1))
    rain.seed(1)
    rain.reset()
    a, b = day.frame().astype(float), rain.frame().astype(float)
    assert day.ego == rain.ego
    assert a[:30].mean() > b[:30].mean() + 20  # a darker sky
    assert a[100:].mean() > b[100:].mean() + 10  # a wet road


def test_an_episodes_first_picture_does_not_hang_on_where_the_one_before_ended(highway: DrivingEnv) -> None:
    sim = simulator(highway)
    pictures = []
    for _ in range(2):
        sim.seed(1)
        sim.reset()
        pictures.append(sim.frame())
        sim.ego = sim.track.pose(sim.track.length - 50, 1.75)
        sim.frame()
    np.testing.assert_array_equal(*pictures)


def drive_episode(env: DrivingEnv, driver: LaneKeepingDriver | RandomDriver, seed: int) -> tuple[float, float, str]:
    env.simulator_seed(seed)
    env.simulator_reset()
    total = 0.0
    while not env.progress.ended:
        _, reward, _, _ = env.simulator_step(np.array(driver.action(env.simulator.view())))
        total += reward
    return total, env.episode_metrics()["distance"], env.progress.ended


@pytest.mark.parametrize("name", ["highway", "ghost_pedestrian"])
def test_the_reward_tells_good_drivers_from_bad(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = Road(name).make(0)
    monkeypatch.setattr(env.simulator, "frame", lambda: np.zeros((128, 128, 3), np.uint8))
    good = [drive_episode(env, LaneKeepingDriver(), seed) for seed in range(3)]
    bad = [drive_episode(env, RandomDriver(seed), seed) for seed in range(3)]
    assert all(ended == "time" for _, _, ended in good)
    assert min(reward for reward, _, _ in good) > 250
    assert max(reward for reward, _, _ in bad) < 50


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match=r"data\.env\.action_repeat is 0"):
        Road(action_repeat=0)
    with pytest.raises(ConfigError, match=r"data\.env\.scenario"):
        Road("motorway")


def test_frames_larger_than_mujocos_buffer(tmp_path: Path) -> None:
    content = yaml.safe_load(shipped_scenarios()["highway"].read_text())
    frames = {}
    for size in (128, 704):
        content["camera"] = {"size": size}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
        env = Road(str(tmp_path / "mine.yaml")).make(0)
        frames[size] = env.reset()["pixels"][-3:].float()
        env.close()
    reduced = torch.nn.functional.interpolate(frames[704][None], size=(128, 128), mode="area")[0]
    # Not cut off at the buffer's edge: where the small one has a picture, the large one has the same.
    assert (reduced - frames[128]).abs().mean() < 6
