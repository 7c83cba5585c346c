"""Frames per second of the built-in road, and a contact sheet to look at.

    python benchmarks/driving_frames.py --sheet docs/driving.png

Rendering takes what cores the OpenGL driver takes: pin it to one with `taskset -c 0`. Prints ticks per second without
and with a 128 × 128 picture, for each scenario; the sheet shows the lane keeper's way through each.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from PIL import Image

from covr_lightning.envs.driving import Road, shipped_scenarios
from covr_lightning.envs.driving.drivers import LaneKeepingDriver

COLUMNS, ENLARGED = 6, 2


def rate(seconds: float, do: object) -> float:
    """Calls per second."""
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        do()  # type: ignore[operator]
        n += 1
    return n / (time.perf_counter() - start)


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path, help="PNG to write")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement")
    arguments = parser.parse_args()
    rows = []
    for name in shipped_scenarios():
        env, driver = Road(name).make(0), LaneKeepingDriver()
        simulator = env.simulator
        env.set_seed(1)
        simulator.reset()
        row = []
        for _ in range(COLUMNS):
            row.append(simulator.frame())
            for _ in range(86 if name == "ghost_pedestrian" else 70):
                simulator.tick(*driver.action(simulator.view()))
        rows.append(np.concatenate(row, 1))

        def both() -> None:
            simulator.tick(0.0, 0.1)  # noqa: B023
            simulator.frame()  # noqa: B023

        simulator.reset()
        ticks = rate(arguments.seconds, lambda: simulator.tick(0.0, 0.1))  # noqa: B023
        simulator.reset()
        print(f"{name}: {ticks:.0f} ticks/s, {rate(arguments.seconds, both):.0f} ticks with a picture/s")
        env.close()
    if arguments.sheet:
        sheet = Image.fromarray(np.concatenate(rows, 0))
        sheet.resize((sheet.width * ENLARGED, sheet.height * ENLARGED), Image.Resampling.NEAREST).save(arguments.sheet)


if __name__ == "__main__":
    main()
