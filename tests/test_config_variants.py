"""What each shipped variant changes of its base, key by key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from covr_lightning.config_files import bundled_configs
from covr_lightning.errors import ConfigError
from covr_lightning.training import CovrCLI
from tests.built_configs import build


class Parsed(CovrCLI):
    def instantiate_classes(self) -> None:
        """Parse only."""


def settings(*arguments: str) -> dict[str, Any]:
    """Every key of a command line with its value, init_args left out of the names."""

    def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, list) and value and isinstance(value[0], Namespace):
            value = {str(n): element for n, element in enumerate(value)}
        if isinstance(value, Namespace):
            value = vars(value)
        if not isinstance(value, dict):
            yield key, value
            return
        for name, below in value.items():
            yield from flat(below, key if name == "init_args" else f"{key}.{name}".lstrip("."))

    return {k: v for k, v in flat(build(*arguments, kind=Parsed).config.fit) if k not in ("config", "base")}


FILTER, SCORE, WEIGHT = (f"trainer.callbacks.0.{slot}.class_path" for slot in ("filter", "score", "weight"))
FINETUNE = "covr_lightning.finetune."
NEVER = {
    "trainer.callbacks.0.schedule.class_path": FINETUNE + "NeverSchedule",
    "trainer.callbacks.0.schedule.psi0_env_steps": None,
}
ON_A_GPU = {
    "data.replay_device": "agent", "model.torch_compile": "inductor", "model.cuda_graphs": True,
    "trainer.precision": "bf16-mixed",
}  # fmt: skip
NO_VLM = {
    "model.prior.class_path": "covr_lightning.agent.NoPrior", "model.prior.after_rounds": None,
    "model.prior.lam": None, "model.prior.label_early": None, "data.sampler": None,
    "data.sampler.class_path": "covr_lightning.data.ReturnSampler", "data.sampler.top": 0.1, "data.sampler.gamma": None,
    **NEVER,
}  # fmt: skip
NO_EDDF = {"trainer.callbacks.0.filter.sign": None, "trainer.callbacks.0.filter.compare": None}
IN_16_BITS = {"vlm.dtype": "bfloat16"}
FROZEN = {"model.prior.after_rounds": None, "model.prior.label_early": None, **NEVER}
NO_CROP = {"model.augmentation.class_path": None, "model.augmentation.size": None, "model.augmentation": None}
#: What each variant changes of its base, key by key; None for a key that is no more.
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "ablations/covr.yaml": ("carla_hw.yaml", {}),
    "ablations/m1.yaml": (
        "carla_hw.yaml",
        {FILTER: FINETUNE + "RandomSubset", "trainer.callbacks.0.filter.like": None,
         "trainer.callbacks.0.filter.seed": 0, **NO_EDDF},
    ),
    **{
        f"ablations/m{m}.yaml": (
            "carla_hw.yaml",
            {FILTER: FINETUNE + "TopFraction", "trainer.callbacks.0.filter.fraction": fraction, **NO_EDDF},
        )
        for m, fraction in ((2, 0.8), (3, 0.9), (4, 0.95))
    },
    "ablations/m5.yaml": ("carla_hw.yaml", {"trainer.callbacks.0.filter.compare": "unscaled"}),
    "ablations/m6.yaml": ("carla_hw.yaml", {SCORE: FINETUNE + "RewardScore", "trainer.callbacks.0.score": None}),
    "ablations/m7.yaml": ("carla_hw.yaml", {SCORE: FINETUNE + "QScore", "trainer.callbacks.0.score": None}),
    "ablations/m8.yaml": (
        "carla_hw.yaml", {WEIGHT: FINETUNE + "UniformWeight", "trainer.callbacks.0.weight.lowest": None}
    ),
    "ablations/m9.yaml": (
        "carla_hw.yaml",
        {WEIGHT: FINETUNE + "RandomWeight", "trainer.callbacks.0.weight.lowest": None,
         "trainer.callbacks.0.weight.seed": 0},
    ),
    "ablations/m10.yaml": ("carla_hw.yaml", {"data.sampler.share": 0.8, **NO_VLM}),
    "ablations/m11.yaml": ("carla_hw.yaml", {"data.sampler.share": 0.5, **NO_VLM}),
    "carla_hw_dpl.yaml": ("carla_hw.yaml", {"model.prior.class_path": "covr_lightning.agent.ConstantPrior", **FROZEN}),
    "dmc_dpl.yaml": ("dmc_covr.yaml", {"model.prior.class_path": "covr_lightning.agent.ConstantPrior", **FROZEN}),
    **{
        name: (
            base,
            {"model.prior.class_path": "covr_lightning.agent.AnnealedPrior", "model.prior.lam": None,
             "model.prior.start": 2.0, "model.prior.decrement": 0.01, "model.prior.every_env_steps": 200,
             "model.prior.floor": 0.1, **FROZEN},
        )
        for name, base in (("carla_hw_apl.yaml", "carla_hw.yaml"), ("dmc_apl.yaml", "dmc_covr.yaml"))
    },
    **{f"sweep_lambda/lambda_{n}.yaml": ("carla_hw.yaml", {"model.prior.lam": float(n)} if n != 2 else {})
       for n in (1, 2, 3)},
    **{f"sweep_psi0/psi0_{n}.yaml":
       ("carla_hw.yaml", {"trainer.callbacks.0.schedule.psi0_env_steps": n} if n != 5000 else {})
       for n in (2500, 5000, 7500, 10000)},
    "learning_cpu/rad.yaml": ("dmc_cartpole_swingup_cpu.yaml", {}),
    "learning_cpu/sac.yaml": ("dmc_cartpole_swingup_cpu.yaml", {"data.env.size": 64, **NO_CROP}),
    "learning_cpu/covr.yaml": (
        "quickstart.yaml",
        {"trainer.callbacks.0.schedule.psi0_env_steps": 5000, "trainer.callbacks.0.vlm_episodes": 5,
         "trainer.log_every_n_steps": None, "model.prior.after_rounds": 4, "model.prior.q_filter": False,
         "data.max_env_steps": 100000,
         "seed_everything": 0, "data.seed": 0, "model.seed": 0,
         "data.replay_capacity": 100000, "data.warmup_agent_steps": 1000, "data.eval_every_env_steps": 10000},
    ),
    "learning_cpu/dpl.yaml": (
        "learning_cpu/covr.yaml", {"model.prior.class_path": "covr_lightning.agent.ConstantPrior", **FROZEN}
    ),
    "learning_cpu/covr_skilled.yaml": (
        "learning_cpu/covr.yaml",
        {"model.prior.class_path": "covr_lightning.agent.SkilledPrior", WEIGHT: FINETUNE + "UniformWeight",
         "trainer.callbacks.0.settings.max_steps": 500, "trainer.callbacks.0.settings.adapter": "new"},
    ),
    "learning_cpu/covr_ahead.yaml": (
        "learning_cpu/covr_skilled.yaml",
        {"model.prior.class_path": "covr_lightning.agent.AheadPrior", "model.prior.after_rounds": 1,
         "vlm.frames": 2, "data.label_every_agent_steps": 1, "trainer.callbacks.0.vlm_episodes": 2,
         "trainer.callbacks.0.settings.number_loss": 12.0},
    ),
    "learning_cpu/covr_q_filter.yaml": (
        "learning_cpu/covr_ahead.yaml",
        {"model.prior.class_path": "covr_lightning.agent.DelayedPrior", "model.prior.q_filter": True},
    ),
    "learning_gpu/rad.yaml": (
        "dmc_rad.yaml",
        {"model.augmentation.class_path": "covr_lightning.agent.RandomCrop", "model.augmentation.size": 84, **ON_A_GPU},
    ),
    "learning_gpu/covr.yaml": (
        "learning_cpu/covr.yaml",
        {"data.env.size": 100, "data.env.rendering": "rad", "data.batch_size": 512, "model.augmentation.size": 84,
         "model.strides": (2, 1, 1, 1), "model.hidden": 1024, "trainer.callbacks.0.vlm_episodes": 0, **ON_A_GPU},
    ),
    "learning_road/covr.yaml": (
        "road_hw.yaml",
        {"data.max_env_steps": 30000, "data.eval_every_env_steps": 5000, "trainer.callbacks.0.vlm_episodes": 5},
    ),
    "learning_road/deepmdp.yaml": (
        "learning_road/covr.yaml",
        {"model.prior.class_path": "covr_lightning.agent.NoPrior", "model.prior.lam": None,
         **FROZEN},
    ),
    "sweep_vlm/qwen2_vl_2b.yaml": ("carla_hw.yaml", {"vlm.path": "Qwen/Qwen2-VL-2B-Instruct", **IN_16_BITS}),
    "sweep_vlm/qwen2_5_vl_3b.yaml": ("carla_hw.yaml", {"vlm.path": "Qwen/Qwen2.5-VL-3B-Instruct", **IN_16_BITS}),
    "sweep_vlm/llava_1_5_7b.yaml": ("carla_hw.yaml", {"vlm.path": "llava-hf/llava-1.5-7b-hf", **IN_16_BITS}),
}  # fmt: skip


def test_every_member_of_a_folder_is_told_from_its_base() -> None:
    assert {name for name in bundled_configs() if "/" in name} <= set(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_a_variant_changes_this_of_its_base_and_nothing_else(name: str) -> None:
    base, expected = CHANGES[name]
    before, after = settings("--config", base), settings("--config", name)
    changed = {key: after.get(key) for key in before | after if before.get(key) != after.get(key)}
    expected = {key: value for key, value in expected.items() if before.get(key) != value}
    assert changed == expected


def test_pieces_keep_what_another_config_changed_of_the_callback() -> None:
    # A base that is applied already would undo m2; and the pieces change keys of the callback, not the whole of it.
    road = settings("--config", "ablations/m2.yaml", "--config", "road_hw.yaml", "--config", "qlora.yaml")
    assert road[FILTER] == FINETUNE + "TopFraction"
    assert road["trainer.callbacks.0.filter.fraction"] == 0.8
    assert road["trainer.callbacks.0.settings.max_steps"] == 250  # road_hw.yaml's
    assert road["trainer.callbacks.0.settings.optimizer"] == "paged_adamw_8bit"
    assert road["trainer.callbacks.0.precision"] == "bf16-mixed"
    assert road["data.env.class_path"] == "covr_lightning.envs.Road"
    alone = settings("--config", "road_hw.yaml")
    assert alone[FILTER] == FINETUNE + "EDDF"
    assert (
        settings("--config", "road_hw.yaml", "--config", "carla_hw.yaml")["data.batch_size"] == 128
    )  # named, not a base


def test_a_mapping_changes_the_last_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "base: quickstart.yaml\nmodel: {init_args: {actor_lr: 5e-4}}\n"
        "trainer:\n  devices: 1\n  callbacks:\n    init_args:\n      at_time_limit: bootstrap\n"
        "      settings: {lr: 1e-4, max_steps: 7}\n      weight: {class_path: covr_lightning.finetune.UniformWeight}\n"
    )
    before, after = settings("--config", "quickstart.yaml"), settings("--config", "mine.yaml")
    assert {key: after[key] for key in after if before.get(key) != after[key]} == {
        "model.actor_lr": 5e-4, WEIGHT: FINETUNE + "UniformWeight", "trainer.callbacks.0.at_time_limit": "bootstrap",
        "trainer.callbacks.0.settings.lr": 1e-4, "trainer.callbacks.0.settings.max_steps": 7,
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text("base: quickstart.yaml\ntrainer: {callbacks: {settings: {epoch: 1}}}\n")
    with pytest.raises(ConfigError, match="epoch"):
        settings("--config", "mine.yaml")
