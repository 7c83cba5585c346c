"""Reference points of the driving scenarios on the built-in road: ER and DD of drivers that learn nothing.

    python benchmarks/driving_reference.py --out docs/results/driving_reference.csv

Per scenario and driver, over ten seeded evaluation episodes: episode reward ER, driving distance DD (mean ± standard
deviation over episodes), and why episodes ended. Drivers: a scripted lane keeper that sees what is ahead, the same one
blind to it, full throttle straight ahead, uniform random actions, and the VLM acting alone (VBE), asked at every agent
step; an answer that cannot be parsed counts as [0, 0].
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from covr_lightning.callbacks.vlm_acts import HeldAnswers

from covr_lightning.data.datamodule import EVAL_SEED_OFFSET
from covr_lightning.envs.driving import DrivingEnv, Road
from covr_lightning.envs.driving.drivers import LaneKeepingDriver, RandomDriver
from covr_lightning.errors import ConfigError
from covr_lightning.finetune.vlm_alone import Answers
from covr_lightning.vlm.vlm import VLM

#: Chooses [steer, throttle] from the environment and its newest frame (H, W, 3) uint8.
Policy = Callable[[DrivingEnv, np.ndarray], tuple[float, float]]


def scripted(blind: bool) -> Policy:
    """The lane keeper; a blind one never sees anybody ahead."""
    driver = LaneKeepingDriver()

    def policy(env: DrivingEnv, frame: np.ndarray) -> tuple[float, float]:
        view = env.simulator.view()
        return driver.action(replace(view, gap=math.inf, gap_speed=0.0) if blind else view)

    return policy


def random_actions() -> Policy:
    """Uniform actions."""
    driver = RandomDriver(0)
    return lambda env, frame: driver.action(env.simulator.view())


def vlm_acts(vlm: VLM, counts: Answers) -> Policy:
    """The VLM alone, asked at every step."""
    answers = HeldAnswers(vlm, idle_action=(0.0, 0.0), hold_agent_steps=1, counts=counts)

    def policy(env: DrivingEnv, frame: np.ndarray) -> tuple[float, float]:
        steer, throttle = answers(torch.from_numpy(frame.transpose(2, 0, 1).copy())[None])[0].tolist()
        return steer, throttle

    return policy


def play(env: DrivingEnv, policy: Policy, episodes: int) -> dict[str, float | str]:
    """Play the evaluation episodes."""
    rewards, distances, ends = [], [], Counter[str]()
    for episode in range(episodes):
        env.simulator_seed(EVAL_SEED_OFFSET + episode)
        frame, total = env.simulator_reset(), 0.0
        while not env.progress.ended:
            frame, reward, _, _ = env.simulator_step(np.array(policy(env, frame)))
            total += reward
        rewards.append(total)
        distances.append(env.episode_metrics()["distance"])
        ends[env.progress.ended] += 1
    return {
        "ER": round(float(np.mean(rewards)), 1),
        "ER_std": round(float(np.std(rewards)), 1),
        "DD": round(float(np.mean(distances)), 1),
        "DD_std": round(float(np.std(distances)), 1),
        "ends": ", ".join(f"{name} {count}" for name, count in ends.most_common()),
    }


def main() -> None:
    """Play everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--scenarios", nargs="+", default=["highway", "ghost_pedestrian"])
    arguments = parser.parse_args()
    rows = []
    try:
        envs = {scenario: Road(scenario).make(0) for scenario in arguments.scenarios}
    except ConfigError as error:
        parser.error(str(error))
    for scenario, env in envs.items():
        vlm, counts = VLM(), Answers()
        vlm.load(env.env_spec)
        policies: dict[str, Policy] = {
            "lane keeper": scripted(blind=False),
            "lane keeper, blind": scripted(blind=True),
            "full throttle": lambda env, frame: (0.0, 1.0),
            "random": random_actions(),
            "VBE, embedded VLM": vlm_acts(vlm, counts),
        }
        for name, policy in policies.items():
            row = {"scenario": scenario, "driver": name, **play(env, policy, arguments.episodes)}
            rows.append(row)
            reward, distance = f"{row['ER']} ± {row['ER_std']}", f"{row['DD']} ± {row['DD_std']}"
            print(f"| {scenario} | {name} | {reward} | {distance} | {row['ends']} |")
        print(f"{scenario}: {counts.unparsable} of {counts.asked} answers unparsable")
        env.close()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
