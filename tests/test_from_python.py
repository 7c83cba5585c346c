"""The blocks of docs/from-python.md, in their order, in a folder with a run; and what `open_run` gives and refuses."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from covr_lightning.cli import main
from covr_lightning.envs import DMControl
from covr_lightning.errors import ConfigError
from covr_lightning.finetune import FineTuneSettings, VLMFineTuner
from covr_lightning.opening import open_run
from covr_lightning.saving.checkpoints import load_checkpoint
from covr_lightning.vlm import VLM

PAGE = Path(__file__).parents[1] / "docs" / "from-python.md"
SHORT = [
    "--data.batch_size",
    "16",
    "--data.max_env_steps",
    "60",
    "--data.warmup_agent_steps",
    "20",
    "--data.eval_every_env_steps",
    "30",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `runs/point_reach`."""
    folder = tmp_path_factory.mktemp("from_python")
    runs = ["--runs_dir", str(folder / "runs"), "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", "point_reach.yaml", *SHORT, "--data.eval_episodes", "2", *runs]) == 0
    return folder


@pytest.fixture
def page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is defined after all blocks."""
    monkeypatch.chdir(folder)
    known: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), known)
    return known


def test_the_page(page: dict[str, Any]) -> None:
    assert page["episode"].agent_steps == 10
    assert page["action"].shape == (1, 2)
    assert page["value"].shape == (1,)

    trained = page["agent"]
    assert trained.counters.env_steps == 200
    assert trained.counters.rounds == 2  # at 60 and 180
    assert sorted(path.name for path in Path("runs/from_python/rounds").glob("*.json")) == [
        "round_001.json",
        "round_002.json",
    ]
    saved = load_checkpoint(Path("runs/from_python/checkpoints/last.ckpt"))
    for name, weights in trained.state_dict().items():
        assert torch.equal(saved["state_dict"][name], weights)

    assert page["actions"].shape == (12, 1)
    assert page["valid"].any()
    assert page["report"].losses
    assert Path("adapter/adapter_model.safetensors").is_file()

    again = page["ExperienceData"](page["PointReach"](size=32), VLM(), **LONGER)
    agent = page["SACModule"](
        again.spec, augmentation=page["RandomCrop"](28), prior=page["ConstantPrior"](0.5), **SMALL
    )
    page["rounds"] = page["ProgressiveFineTune"](page["LinearSchedule"](psi0_env_steps=60))
    page["trainer"]().fit(agent, again, ckpt_path="runs/from_python/checkpoints/last.ckpt", weights_only=True)
    assert agent.counters.env_steps == 220


LONGER = {
    "max_env_steps": 220, "batch_size": 32, "replay_capacity": 200, "warmup_agent_steps": 50,
    "eval_every_env_steps": 100, "eval_episodes": 2,
}  # fmt: skip
SMALL = {"filters": 8, "strides": (2, 2), "hidden": 64}


def test_an_opened_run_has_the_checkpoints_weights_and_leaves_random_numbers_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    for checkpoint in ("best", "last"):
        agent, env, vlm = open_run(folder / "runs" / "point_reach", checkpoint)
        saved = load_checkpoint(folder / "runs" / "point_reach" / "checkpoints" / f"{checkpoint}.ckpt")
        for name, weights in agent.state_dict().items():
            assert torch.equal(saved["state_dict"][name], weights)
        assert not agent.training
        assert env.spec == agent.spec
        assert vlm.model is None
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_run_of_other_packages_and_devices_is_opened(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "runs" / "point_reach", tmp_path / "theirs")
    config = yaml.safe_load((tmp_path / "theirs" / "config.yaml").read_text())
    config["trainer"] |= {"accelerator": "gpu", "devices": 8, "strategy": "ddp", "profiler": "simple"}
    config["trainer"]["logger"] = [{"class_path": "lightning.pytorch.loggers.CometLogger"}]
    (tmp_path / "theirs" / "config.yaml").write_text(yaml.safe_dump(config))
    filters = [*warnings.filters]
    assert open_run(tmp_path / "theirs").env.spec.task == "point-reach"
    assert warnings.filters == filters


def test_what_cannot_be_built_is_said(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "runs" / "point_reach", tmp_path / "theirs")
    config = (tmp_path / "theirs" / "config.yaml").read_text()
    assert "gamma: 0.8" in config
    (tmp_path / "theirs" / "config.yaml").write_text(config.replace("gamma: 0.8", "gamma: 8"))
    with pytest.raises(ConfigError, match=r"^model\.gamma is 8\.?0?; it must lie in 0 to 1"):
        open_run(tmp_path / "theirs")


def test_what_is_no_run(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no folder of a run: it has no config\.yaml"):
        open_run(folder)
    with pytest.raises(ConfigError, match=r"has no checkpoint 'newest'; it has best, last\."):
        open_run(folder / "runs" / "point_reach", "newest")


def test_a_vlm_is_loaded_before_it_is_asked_or_trained() -> None:
    vlm = VLM()
    with pytest.raises(RuntimeError, match=r"VLM\.load\(spec\) comes first"):
        vlm.propose(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    tuner = VLMFineTuner(vlm, FineTuneSettings())
    with pytest.raises(RuntimeError, match=r"VLM\.load\(spec\) comes before VLMFineTuner"):
        tuner.configure_model()


def test_a_trainer_of_ones_own_leaves_the_vlm_ready_to_answer(untrained_vlm: Path) -> None:
    import lightning as L

    vlm = VLM(str(untrained_vlm))
    vlm.load(DMControl("reacher-easy").spec)
    tuner = VLMFineTuner(vlm, FineTuneSettings(batch_size=2))
    frames = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(tuner, tuner.train_loader(frames, torch.full((4, 2), 0.5), torch.ones(4)))
    assert len(tuner.losses) == 1
    assert not vlm.model.training
    assert not vlm.base_model.is_gradient_checkpointing
    assert len(vlm.answer(frames)) == 4
