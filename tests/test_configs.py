"""Every shipped YAML parses, builds its objects, and shows the command that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from covr_lightning.callbacks import ProgressiveFineTune
from jsonargparse import Namespace

from covr_lightning.agent import (
    CURL,
    SPR,
    ConvTrunk,
    DeepMDP,
    DelayedPrior,
    DrQViews,
    Flare,
    GaussianActor,
    NoAugmentation,
    NoPrior,
    OneView,
    RandomCrop,
    RandomShift,
    RandomTranslate,
    ResActEncoder,
    ResidualActor,
    SACModule,
    SVEAViews,
)
from covr_lightning.config_files import (
    bundled_configs,
    resolve,
    resolve_arguments,
    resolve_folder,
    with_bases,
    yamls_in,
)
from covr_lightning.data import EmphasizingRecentSampler, ExperienceData, ProportionalSampler
from covr_lightning.envs import Road
from covr_lightning.errors import ConfigError
from covr_lightning.finetune import SavedRows, VLMFineTuner
from covr_lightning.finetune.cli import FineTuneCLI, fine_tunes_alone
from covr_lightning.training import CovrCLI

PIECES = {
    "crop.yaml": ["dmc_rad.yaml"],
    "cutout.yaml": ["dmc_sac.yaml", "road_hw.yaml"],
    "qlora.yaml": ["carla_hw.yaml"],
}
DRIVING = ["carla_hw.yaml", "road_gp.yaml"]


def ways_to_build() -> list[tuple[str, ...]]:
    """Every shipped config, and every piece on each config that it is for; saved rows have a command of their own."""
    names = [name for name in bundled_configs() if name != "vlm_sft.yaml"]
    bases = {name: DRIVING if name.startswith("driving_") else PIECES.get(name) for name in names}
    return [(*base, name) for name in names for base in ([(b,) for b in bases[name] or []] or [()])]


def build(*arguments: str, kind: type[CovrCLI] = CovrCLI) -> CovrCLI:
    class Built(kind):  # type: ignore[valid-type, misc]
        def _run_subcommand(self, subcommand: str) -> None:
            """Build everything, train nothing."""

    resolved, _ = resolve_arguments(["fit", *arguments])
    return Built(
        SACModule, ExperienceData, subclass_mode_model=True, subclass_mode_data=True, auto_configure_optimizers=False,
        args=resolved,
    )  # fmt: skip


@pytest.mark.parametrize("names", ways_to_build(), ids="+".join)
def test_every_config_builds(names: tuple[str, ...], tmp_path: Path) -> None:
    cli = build(*(part for name in names for part in ("--config", name)), "--runs_dir", str(tmp_path))
    assert isinstance(cli.trainer, L.Trainer)
    assert cli.model.spec == cli.datamodule.spec
    assert cli.datamodule.vlm.model is None  # nothing is loaded before it is needed


# What each method has beside plain SAC: sampler, augmentation, views, encoder, actor head, objectives, prior.
METHODS: dict[str, dict[str, Any]] = {
    "sac": {},
    "rad": {"augmentation": RandomTranslate},
    "drq": {"augmentation": RandomShift, "views": DrQViews},
    "svea": {"augmentation": RandomShift, "views": SVEAViews},
    "curl": {"augmentation": RandomCrop, "objectives": [CURL]},
    "deepmdp": {"objectives": [DeepMDP]},
    "flare": {"augmentation": RandomTranslate, "trunk": Flare},
    "resact": {"trunk": ResActEncoder, "actor": ResidualActor, "objectives": [DeepMDP]},
    "spr": {"augmentation": RandomCrop, "objectives": [SPR]},
    "per": {"sampler": ProportionalSampler},
    "ere": {"sampler": EmphasizingRecentSampler},
    "covr_sac": {"prior": DelayedPrior},
    "covr_deepmdp": {"prior": DelayedPrior, "objectives": [DeepMDP]},
    "covr_rad": {"prior": DelayedPrior, "augmentation": RandomTranslate},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["dmc", "driving"])
def test_a_method_is_its_parts(method: str, place: str, tmp_path: Path) -> None:
    named = [f"{place}_{method}.yaml"]
    if place == "driving":  # the driving configs as they are have DeepMDP
        named = ["carla_hw.yaml"] if method == "covr_deepmdp" else ["carla_hw.yaml", *named]
    elif method == "covr_rad":
        named = ["dmc_covr.yaml"]
    cli = build(*(part for name in named for part in ("--config", name)), "--runs_dir", str(tmp_path))
    plain = {"augmentation": NoAugmentation, "views": OneView, "trunk": ConvTrunk, "actor": GaussianActor}
    expected = {**plain, "objectives": [], "prior": NoPrior, **METHODS[method]}
    assert type(cli.datamodule.sampler) is expected.pop("sampler", type(None))
    if (method, place) == ("resact", "dmc"):
        expected["augmentation"] = RandomTranslate
    objectives = [type(objective) for objective in cli.model.objectives]
    got = {name: objectives if name == "objectives" else type(getattr(cli.model, name)) for name in expected}
    assert got == expected
    assert cli.model.spec.frame_stack == (4 if method == "resact" else 3)
    if method == "spr":
        assert cli.model.objectives[0].weight == 1.0
    rounds = [callback for callback in cli.trainer.callbacks if isinstance(callback, ProgressiveFineTune)]
    assert len(rounds) == method.startswith("covr")


def test_the_config_of_saved_rows_builds() -> None:
    class Built(FineTuneCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            """Build everything, train nothing."""

    resolved, _ = resolve_arguments(["fit", "--config", "vlm_sft.yaml", "--trainer.devices", "2"])
    assert fine_tunes_alone(resolved)
    assert not fine_tunes_alone(resolve_arguments(["fit", "--config", "dmc_covr.yaml"])[0])
    cli = Built(
        VLMFineTuner, SavedRows, subclass_mode_model=True, subclass_mode_data=True, auto_configure_optimizers=False,
        args=[*resolved, "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"],
    )  # fmt: skip
    assert cli.trainer.world_size == 2
    assert cli.model.vlm.model is None
    assert (cli.model.settings.lr, cli.datamodule.rows) == (1e-4, ["runs/dmc_covr/rounds"])


@pytest.mark.parametrize("name", bundled_configs())
def test_every_header_shows_its_command(name: str) -> None:
    head = bundled_configs()[name].read_text().split("\n\n")[0]
    command = next(line for line in head.splitlines() if line.startswith("#   covr fit"))
    assert f"--config {name}" in command
    assert len(head.splitlines()[0]) > 20


def test_overrides_reach_the_objects(tmp_path: Path) -> None:
    cli = build(
        "--config", "dmc_covr.yaml", "--config", "crop.yaml", "--data.env.task", "walker-walk",
        "--model.prior.lam", "2", "--vlm.lora.rank", "4", "--vlm.path", "somewhere", "--runs_dir", str(tmp_path),
    )  # fmt: skip
    assert cli.model.augmentation.size == 84
    assert cli.model.prior.lam == 2
    assert cli.datamodule.spec.task == "walker-walk"
    assert (cli.datamodule.vlm.lora.rank, cli.datamodule.vlm.lora.alpha, cli.datamodule.vlm.path) == (
        4,
        16,
        "somewhere",
    )


def test_a_config_builds_on_its_bases(tmp_path: Path) -> None:
    cli = build("--config", "road_gp.yaml", "--runs_dir", str(tmp_path), "--model.prior.lam", "3")
    env = cli.datamodule.env_factory
    assert isinstance(env, Road)  # road_hw.yaml's instead of carla_hw.yaml's
    assert env.scenario.name == "ghost_pedestrian"  # its own
    assert (env.action_repeat, cli.datamodule.batch_size, cli.datamodule.warmup_agent_steps) == (4, 64, 1000)
    model = cli.model
    assert isinstance(model.objectives[0], DeepMDP)  # carla_hw.yaml's
    assert (model.prior.lam, model.prior.after_rounds, model.alpha_betas) == (3, 2, (0.9, 0.999))
    assert cli.datamodule.vlm.lora.targets == ".*text_model.*(q|k|v|o|gate|up|down)_proj|lm_head"
    assert cli.config.fit.base == "road_hw.yaml"


def test_bases_are_found_in_turn_and_never_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("base: [b.yaml, dmc_sac]\n")
    (tmp_path / "b.yaml").write_text("base: c\n")
    (tmp_path / "c.yaml").write_text("runs_dir: x\n")
    assert [p.name for p in with_bases(Path("a.yaml"))] == ["c.yaml", "b.yaml", "dmc_sac.yaml", "a.yaml"]
    (tmp_path / "c.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"builds on itself .*a\.yaml → b\.yaml → c\.yaml"):
        with_bases(Path("a.yaml"))
    (tmp_path / "c.yaml").write_text("base: {x: 1}\n")
    with pytest.raises(ConfigError, match="list of names"):
        with_bases(Path("c.yaml"))


def test_a_base_of_two_bases_is_applied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "bottom": "model: {init_args: {hidden: 111}}", "left": "base: bottom.yaml\nmodel: {init_args: {hidden: 222}}",
        "right": "base: bottom.yaml\nmodel: {init_args: {latent: 7}}", "top": "base: [left.yaml, right.yaml]",
    }.items():  # fmt: skip
        Path(f"{name}.yaml").write_text(text)
    resolved, _ = resolve_arguments(["fit", "--config", "top.yaml"])
    assert [Path(path).stem for path in resolved[2::2]] == ["bottom", "left", "right", "top"]


def test_a_base_is_looked_for_beside_its_config_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("mine/dmc_rad.yaml", "dmc_rad.yaml"):
        Path(name).write_text("seed_everything: 3")
    Path("mine/x.yaml").write_text("base: dmc_rad.yaml")
    assert with_bases(Path("mine/x.yaml")) == [Path("mine/dmc_rad.yaml"), Path("mine/x.yaml")]
    Path("mine/dmc_rad.yaml").unlink()
    assert with_bases(Path("mine/x.yaml"))[0] == Path("dmc_rad.yaml")
    Path("dmc_rad.yaml").unlink()
    assert with_bases(Path("mine/x.yaml"))[0].parent.name == "configs"


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("data: {init_args: {max_env_steps: 60000}}\nmodel: {}\ndata: {init_args: {seed: 1}}\n")
    with pytest.raises(
        ConfigError, match=r"twice.yaml has the key data twice in one place, in lines 1 and 3; put both"
    ):
        with_bases(path)
    path.write_text("trainer:\n  callbacks:\n    - init_args: {samples: 1, samples: 2}\n")
    with pytest.raises(ConfigError, match="the key samples twice in one place, in lines 3 and 3"):
        with_bases(path)
    path.write_text("a: {x: 1}\nb: {x: 1}\nc: [{x: 1}, {x: 2}]\n")
    assert with_bases(path) == [path]


def test_names_resolve_here_first_then_among_the_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = bundled_configs()["quickstart.yaml"]
    assert resolve("quickstart.yaml") == resolve("quickstart") == shipped
    (tmp_path / "quickstart.yaml").write_text("{}")
    assert resolve("quickstart").resolve() == tmp_path / "quickstart.yaml"
    with pytest.raises(ConfigError, match=r"did you mean dmc_rad\.yaml"):
        resolve("dmc_rd.yaml")
    with pytest.raises(ConfigError, match=r"No config 'nope\.yaml' in .* \(--config\): `covr configs` lists"):
        resolve("nope.yaml")
    with pytest.raises(ConfigError, match=r"runs/mine/config\.yaml \(--config\) is no file: there is no such run in"):
        resolve("runs/mine/config.yaml")


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
    "data.sampler.class_path": "covr_lightning.data.ReturnSampler", "data.sampler.top": 0.1, "data.sampler.gamma": 0.99,
    **NEVER,
}  # fmt: skip
NO_EDDF = {"trainer.callbacks.0.filter.sign": None, "trainer.callbacks.0.filter.compare": None}
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
         "trainer.log_every_n_steps": None, "model.prior.after_rounds": 4, "data.max_env_steps": 100000,
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
    "sweep_vlm/qwen2_vl_2b.yaml": ("carla_hw.yaml", {"vlm.path": "Qwen/Qwen2-VL-2B-Instruct"}),
    "sweep_vlm/qwen2_5_vl_3b.yaml": ("carla_hw.yaml", {"vlm.path": "Qwen/Qwen2.5-VL-3B-Instruct"}),
    "sweep_vlm/llava_1_5_7b.yaml": ("carla_hw.yaml", {"vlm.path": "llava-hf/llava-1.5-7b-hf"}),
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


def test_names_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = bundled_configs()
    assert resolve("ablations/m2.yaml") == resolve("ablations/m2") == shipped["ablations/m2.yaml"]
    with pytest.raises(ConfigError, match=r"did you mean ablations/m7\.yaml"):
        resolve("m7.yaml")
    assert resolve_folder("ablations") == shipped["ablations/m2.yaml"].parent
    assert [path.stem for path in yamls_in(resolve_folder("ablations"))] == ["covr", *(f"m{n}" for n in range(1, 12))]
    (tmp_path / "ablations").mkdir()
    assert resolve_folder("ablations") == Path("ablations")
    with pytest.raises(ConfigError, match="did you mean sweep_lambda"):
        resolve_folder("sweep_lamda")
