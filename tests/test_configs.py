"""Every shipped YAML parses, builds its objects, and shows the command that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from covr_lightning.callbacks import ProgressiveFineTune

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
from covr_lightning.data import EmphasizingRecentSampler, ProportionalSampler
from covr_lightning.envs import Road
from covr_lightning.errors import ConfigError
from covr_lightning.finetune import SavedRows, VLMFineTuner
from covr_lightning.finetune.cli import FineTuneCLI, fine_tunes_alone
from tests.built_configs import build

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
