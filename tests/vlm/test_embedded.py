"""The shipped embedded VLM reads pictures, and its recipe runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from covr_lightning.errors import ConfigError
from covr_lightning.vlm.embedded import Recipe, evaluate_embedded_vlm, train_embedded_vlm
from covr_lightning.vlm.embedded.frames import render_frames
from covr_lightning.vlm.embedded.scenes import embedded_scenes
from covr_lightning.vlm.embedded.suite_scenes import SuiteStage
from covr_lightning.vlm.loading import embedded_folder

OPEN_WITHOUT_THE_PACKAGE = """
import sys, torch
sys.modules["torchvision"] = None  # as if it were not installed
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).float()
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "action:[a, b]"}]}]
text = processor.apply_chat_template(turn, add_generation_prompt=True)
inputs = processor(text=[text], images=[[Image.new("RGB", (100, 100), (20, 40, 90))]], return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=8)
assert model.generation_config.do_sample is False
assert not any(name.split(".")[0] == "covr_lightning" for name in sys.modules)
print(type(processor).__name__, type(model).__name__)
"""


def test_opens_with_plain_auto_classes(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-c", OPEN_WITHOUT_THE_PACKAGE, str(embedded_folder())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Idefics3Processor", "Idefics3ForConditionalGeneration"]


def test_folder_is_small_and_has_its_report() -> None:
    files = list(embedded_folder().iterdir())
    assert sum(file.stat().st_size for file in files) <= 15e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    report = json.loads((embedded_folder() / "report.json").read_text())
    assert report["mean_ratio"] <= 0.6
    assert all(scene["ratio"] < 1.0 for scene in report["scenes"].values())


def test_beats_a_constant_predictor_on_fresh_frames() -> None:
    measured = evaluate_embedded_vlm(frames_per_scene=24, frames_per_task=4, seed=77)
    assert measured["mean_ratio"] <= 0.6
    for name, scene in measured["scenes"].items():
        assert scene["ratio"] < 1.0, name
    assert np.mean(list(measured["task_prompts_unparsable_rate"].values())) <= 0.25


def test_recipe_runs_and_is_deterministic(tmp_path: Path) -> None:
    recipe = Recipe(
        frames_per_scene=8,
        held_out_per_scene=2,
        held_out_per_task=1,
        vision_steps=2,
        vision_batch_size=8,
        short_steps=2,
        short_batch_size=8,
        language_steps=1,
        language_batch_size=4,
        joint_steps=1,
        joint_batch_size=4,
        form_steps=1,
        form_batch_size=4,
        render_processes=0,
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"--out is '.*a', which exists and is no folder that .* wrote"):
        train_embedded_vlm(tmp_path / "a", recipe=recipe)
    (tmp_path / "a" / "thesis.tex").rename(tmp_path / "a" / "report.json")  # one that it wrote
    reports = [train_embedded_vlm(tmp_path / name, seed=3, recipe=recipe, log=lambda _: None) for name in "ab"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert reports[0]["scenes"].keys() == embedded_scenes().keys()
    assert {"README.md", "report.json", "config.json", "tokenizer.json"} <= {f.name for f in (tmp_path / "a").iterdir()}


@pytest.mark.parametrize("name", embedded_scenes())
def test_readings_are_pure_functions_within_bounds(name: str) -> None:
    scene = embedded_scenes()[name]
    stage = scene.open(full_quality=False)
    rng = np.random.default_rng(0)
    for _ in range(20):
        stage.place(rng)
        state = stage.physics.get_state() if isinstance(stage, SuiteStage) else None
        readings = stage.read()
        assert readings.shape == (len(scene.readings),)
        assert np.abs(readings).max() <= 1.0
        np.testing.assert_array_equal(stage.read(), readings)
        if isinstance(stage, SuiteStage):
            np.testing.assert_array_equal(stage.physics.get_state(), state)
            assert not stage.physics.data.ctrl.any()
    stage.close()


def test_readings_by_hand() -> None:
    stage = embedded_scenes()["cartpole"].open(full_quality=False)
    assert isinstance(stage, SuiteStage)
    stage.physics.named.data.qpos["slider"] = 0.85
    stage.physics.named.data.qpos["hinge_1"] = np.pi / 2
    stage.physics.forward()
    # 0.85 / 1.7 = 0.5; sin 90 degrees = 1; cos = 0; 90 of 180 degrees from upright lies in the middle: 0.
    np.testing.assert_allclose(stage.read(), [0.5, 1.0, 0.0, 0.0], atol=1e-6)
    stage.close()


def test_road_readings_by_hand() -> None:
    # What the drawn placement says must be what the road's own projection says of the poses that are shown.
    stage = embedded_scenes()["highway"].open(full_quality=False)
    rng = np.random.default_rng(3)
    for _ in range(20):
        stage.place(rng)
        ego, vehicles, _, _ = stage._placement
        track = stage._scene.track
        s, d = track.project(ego.x, ego.y)
        position, error, distance, side = stage.read()
        assert (position + 1) * 7 == pytest.approx(d, abs=1e-3)  # a road of four lanes of 3.5 m
        assert error * 0.3 == pytest.approx(track.heading(s) - ego.heading, abs=1e-6)
        # Bumper to middle: half a car of 4.6 m lies between. The first car is the nearest, and in a lane's middle.
        others = [track.project(p.x, p.y) for _, p in vehicles]
        assert others[0][0] == min(other_s for other_s, _ in others)
        assert (distance + 1) * 20 == pytest.approx(others[0][0] - s - 2.3, abs=1e-3)
        assert side * 14 == pytest.approx(others[0][1] - d, abs=1e-3)
        assert others[0][1] % 3.5 == pytest.approx(1.75, abs=1e-6)
    stage.close()


def test_frames_depend_on_the_seed_alone() -> None:
    scene = embedded_scenes()["pendulum"]
    first, again, other = (render_frames(scene, 5, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.readings, again.readings)
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert np.abs(first.readings - other.readings).max() > 0.01
