"""Wrong keys and values in a YAML or on the command line: one sentence, no usage, status 2."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from covr_lightning.agent import DeepMDP
from covr_lightning.cli import main
from covr_lightning.data import ExperienceData

QUICK = ["fit", "--config", "quickstart.yaml"]


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> str:
    """What is printed: one line, and nothing else."""
    assert main([*QUICK, *arguments, "--runs_dir", str(tmp_path / "runs")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (sentence,) = printed.err.strip().splitlines()
    assert sentence.startswith("covr: ")
    assert not (tmp_path / "runs").exists()
    return sentence.removeprefix("covr: ")


def nested(path: str, value: object) -> dict:
    for key in reversed(path.split("/")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize(
    ("option", "value", "start"),
    [
        ("data.batchsize", "3", "data.batchsize is no key of ExperienceData (did you mean batch_size?); its keys are"),
        ("model.gama", "3", "model.gama is no key of SACModule (did you mean gamma?); its keys are augmentation, "),
        ("data.env.taks", "x", "data.env.taks is no key of DMControl (did you mean task?); its keys are task, size, "),
        ("modle.gamma", "3", "modle is no key (did you mean model?); the keys are seed_everything, trainer, model, "),
        ("trainer.max_epochz", "3", "trainer.max_epochz is no key of trainer (did you mean max_epochs?); its keys"),
        ("vlm.pth", "x", "vlm.pth is no key of vlm (did you mean path?); its keys are path, lora, prompt, dtype"),
        ("vlm.lora.rnk", "3", "vlm.lora.rnk is no key of LoRA (did you mean rank?); its keys are rank, alpha, "),
        ("trainer.callbacks.setings.lr", "3", "trainer.callbacks.setings is no key of ProgressiveFineTune (did "),
        ("trainer.callbacks.psi", "3", "trainer.callbacks.psi is no key of ProgressiveFineTune; its keys are schedule"),
    ],
)
def test_unknown_keys_of_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, value: str, start: str
) -> None:
    assert refused(capsys, tmp_path, f"--{option}", value).startswith(start)


@pytest.mark.parametrize(
    ("path", "start"),
    [
        ("dataa/x", "dataa is no key (did you mean data?); the keys are seed_everything, trainer, "),
        ("trainer/devicess", "trainer.devicess is no key of trainer (did you mean devices?); its keys are accelerator"),
        ("data/init_args/batchsize", "data.batchsize is no key of ExperienceData (did you mean batch_size?); "),
        ("model/init_args/prior/init_args/lamda", "model.prior.lamda is no key of DelayedPrior (did you mean lam?); "),
    ],
)
def test_unknown_keys_of_a_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path, path: str, start: str) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(nested(path, 1)))
    assert refused(capsys, tmp_path, "--config", str(tmp_path / "mine.yaml")).startswith(start)


def test_the_keys_are_those_that_a_user_can_set(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    listed = refused(capsys, tmp_path, "--data.batchsize", "3").split("its keys are ")[1].rstrip(".").split(", ")
    assert listed == [name for name in inspect.signature(ExperienceData).parameters if name != "vlm"]


@pytest.mark.parametrize(
    ("entry", "start"),
    [
        ({"setings": {"epochs": 2}}, "trainer.callbacks.setings is no key of ProgressiveFineTune (did you mean setti"),
        ({"settings": {"epoch": 2}}, "trainer.callbacks.settings.epoch is no key of FineTuneSettings (did you mean e"),
        ({"settings": {"epochs": "two"}}, "trainer.callbacks.settings.epochs is 'two'; it must be an int."),
    ],
)
def test_callbacks(capsys: pytest.CaptureFixture[str], tmp_path: Path, entry: dict, start: str) -> None:
    callback = {"class_path": "covr_lightning.callbacks.ProgressiveFineTune", "init_args": entry}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    assert refused(capsys, tmp_path, "--config", str(tmp_path / "mine.yaml")).startswith(start)


def test_classes_in_a_list(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    objective = {"class_path": f"covr_lightning.agent.{DeepMDP.__name__}", "init_args": {"lrr": 1}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(nested("model/init_args/objectives", [objective])))
    sentence = refused(capsys, tmp_path, "--config", str(tmp_path / "mine.yaml"))
    assert sentence.startswith("model.objectives.lrr is no key of DeepMDP (did you mean lr?); its keys are lr, ")


@pytest.mark.parametrize(
    ("path", "given", "parts"),
    [
        ("data", "covr_lightning.data.ExperienceDat", ["data is", "did you mean covr_lightning.data.ExperienceData?"]),
        (
            "model/init_args/augmentation",
            "covr_lightning.agent.RandomCrp",
            ["model.augmentation is", "did you mean covr_lightning.agent.RandomCrop?", "agent.RandomTranslate."],
        ),
        (
            "data/init_args/env",
            "covr_lightning.envs.DMContrl",
            ["data.env is", "did you mean covr_lightning.envs.DMControl?", "covr_lightning.envs.CarRacing"],
        ),
        ("model", "covr_lightning.agnt.SACModule", ["model is", "did you mean covr_lightning.agent.SACModule?"]),
        ("model", "SACModul", ["model is", "did you mean covr_lightning.agent.SACModule?"]),
        ("data/init_args/sampler", "foo", ["data.sampler is", "covr_lightning.data.ReturnSampler"]),
    ],
)
def test_unknown_classes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, path: str, given: str, parts: list[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(nested(f"{path}/class_path", given)))
    sentence = refused(capsys, tmp_path, "--config", str(tmp_path / "mine.yaml"))
    for part in (repr(given), *parts):
        assert part in sentence


def test_unknown_callback_and_a_class_of_another_kind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    callbacks = [{"class_path": "covr_lightning.callbacks.ProgresiveFineTune"}]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    sentence = refused(capsys, tmp_path, "--config", str(tmp_path / "mine.yaml"))
    assert "did you mean covr_lightning.callbacks.ProgressiveFineTune?" in sentence
    sentence = refused(capsys, tmp_path, "--model.prior", "covr_lightning.agent.RandomCrop")
    assert sentence.startswith("model.prior is 'covr_lightning.agent.RandomCrop', which is no Prior; this package has ")
    assert "covr_lightning.agent.DelayedPrior" in sentence


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("data.batch_size", "x", "data.batch_size is 'x'; it must be an int."),
        ("data.batch_size", "1.5", "data.batch_size is 1.5; it must be an int."),
        ("data.env.action_repeat", "big", "data.env.action_repeat is 'big'; it must be an int or null."),
        ("data.env.rendering", "slow", "data.env.rendering is 'slow'; it must be 'rad' or 'fast'."),
        ("model.strides", "3", "model.strides is 3; it must be a tuple."),
        ("model.strides", "[2, x]", "model.strides holds 'x'; each of its elements must be an int."),
        ("model.alpha_betas", "[1]", "model.alpha_betas is [1]; it must be a tuple with 2 elements."),
        ("vlm.lora.targets", "{a: 1}", "vlm.lora.targets is {'a': 1}; it must be a str or a list."),
        ("vlm.lora", "3", "vlm.lora is 3; it must have keys of LoRA: rank, alpha, dropout, targets."),
        ("vlm.prompt", "{system: a}", "vlm.prompt lacks what Prompt needs: user, action_names."),
        ("seed_everything", "x", "seed_everything is 'x'; it must be a bool or an int."),
        ("trainer.max_epochs", "x", "trainer.max_epochs is 'x'; it must be an int or null."),
        ("video", "maybe", "video is 'maybe'; it must be a bool."),
        ("model.gamma", "null", "model.gamma is null; it must be a float."),
        ("model.strides", "null", "model.strides is null; it must be a tuple[int, ...]."),
        ("model.on_non_finite", "null", "model.on_non_finite is null; it must be 'stop' or 'skip'."),
        ("data.eval_every_env_steps", "null", "data.eval_every_env_steps is null; it must be an int."),
        ("data.env", "null", "data lacks what ExperienceData needs: env."),
        ("vlm.frames", "null", "vlm.frames is null; it must be an int."),
        ("trainer.callbacks.schedule.psi0_env_steps", "z",
         "trainer.callbacks.schedule.psi0_env_steps is 'z'; it must be an int."),
    ],
)  # fmt: skip
def test_wrong_types(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, value: str, sentence: str
) -> None:
    assert refused(capsys, tmp_path, f"--{option}", value) == sentence


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("data:\n  init_args:\n   env: [1, 2\nmodel: }\n", ["line 4, column 6"]),
        ("data:\n\tx: 3\n", ["line 2, column 1"]),
        ("just words\n", ["has no keys", "data, model, trainer"]),
        ("", ["has no keys"]),
        ("\u0000", ["no YAML"]),
    ],
)
def test_broken_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    sentence = refused(capsys, tmp_path, "--config", str(tmp_path / "broken.yaml"))
    for part in (str(tmp_path / "broken.yaml"), *parts):
        assert part in sentence


def test_an_unknown_shape_keeps_the_parsers_own_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert refused(capsys, tmp_path, "extra") == "unrecognized arguments: extra"


def test_a_class_that_is_abstract(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sentence = refused(capsys, tmp_path, "--data.env", "covr_lightning.envs.EnvFactory")
    assert sentence.startswith(
        "data.env needs the class_path of a kind of EnvFactory; this package has covr_lightning."
    )


def test_what_lacks_a_class_path(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("trainer: {callbacks: [3]}")
    sentence = refused(capsys, tmp_path, "--config", str(tmp_path / "mine.yaml"))
    assert sentence.startswith("trainer.callbacks needs the class_path of a kind of Callback; this package has covr_li")


def test_help_is_still_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["fit", "--help"])
    assert left.value.code == 0
    assert "--vlm.path" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("piece", "start"), [("crop.yaml", "The config has no data"), ("qlora.yaml", "trainer.callbacks ")]
)
def test_a_piece_alone(capsys: pytest.CaptureFixture[str], piece: str, start: str) -> None:
    assert main(["fit", "--config", piece]) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith(f"covr: {start}")
    assert "put that before it" in sentence


MINE = """
from lightning.pytorch.loggers import CSVLogger
from covr_lightning.agent import Prior
from covr_lightning.envs import PointReach
from covr_lightning.errors import ConfigError

class Unfinished(Prior):
    pass

class Raises(Prior):
    def __init__(self) -> None:
        raise KeyError("nowhere")

    def weight(self, counters):
        return 1.0

class RaisesInAList(CSVLogger):
    def __init__(self) -> None:
        raise KeyError("nowhere")

class Chained(PointReach):
    def __init__(self) -> None:
        try:
            open("/nowhere/at/all")
        except OSError as error:
            raise KeyError("nowhere") from error

class Says(CSVLogger):
    def __init__(self) -> None:
        raise ConfigError("trainer.logger.level is 0; it must be 1.")
"""


@pytest.fixture
def _mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of somebody's own: one with classes, one that imports what is not there, and some with other faults."""
    (tmp_path / "mine_of_a_test.py").write_text(MINE)
    (tmp_path / "broken_of_a_test.py").write_text("import not_there_of_a_test")
    (tmp_path / "faulty_of_a_test.py").write_text("class Any:\n    number = undefined\n")
    (tmp_path / "over_it_of_a_test.py").write_text("import faulty_of_a_test")
    (tmp_path / "unread_of_a_test.py").write_text("def f(:\n")
    (tmp_path / "odd_of_a_test.py").write_text("int('x')")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("_mine")
@pytest.mark.parametrize("as_yaml", [False, True])
@pytest.mark.parametrize(
    ("path", "start"),
    [
        ("mine_of_a_test.Unfinished", "model.prior is mine_of_a_test.Unfinished, which has yet to define weight."),
        ("mine_of_a_test.Other", "model.prior is 'mine_of_a_test.Other', which is no class; this package has covr_"),
        ("not_there_of_a_test.Other", "model.prior is 'not_there_of_a_test.Other', which is no class; this package "),
        (
            "broken_of_a_test.Any",
            "model.prior is 'broken_of_a_test.Any', but the import of broken_of_a_test failed: No module named",
        ),
        (
            "faulty_of_a_test.Any",
            "model.prior is 'faulty_of_a_test.Any', but the import of faulty_of_a_test failed: name 'undefined' is not "
            "defined (faulty_of_a_test.py, line 2).",
        ),
        (
            "over_it_of_a_test.Any",
            "model.prior is 'over_it_of_a_test.Any', but the import of over_it_of_a_test failed: name 'undefined' is "
            "not defined (faulty_of_a_test.py, line 2).",
        ),
        (
            "unread_of_a_test.Any",
            "model.prior is 'unread_of_a_test.Any', but the import of unread_of_a_test failed: invalid syntax "
            "(unread_of_a_test.py, line 1).",
        ),
        (
            "odd_of_a_test.Any",
            "model.prior is 'odd_of_a_test.Any', but the import of odd_of_a_test failed: invalid literal for int()",
        ),
    ],
)
def test_classes_of_ones_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, path: str, start: str, as_yaml: bool
) -> None:
    written = nested("model/init_args/prior/class_path", path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(written))
    given = ["--config", str(tmp_path / "mine.yaml")] if as_yaml else ["--model.prior", path]
    assert refused(capsys, tmp_path, *given).startswith(start)


@pytest.mark.usefixtures("_mine")
@pytest.mark.parametrize(
    ("path", "kind"),
    [("model/init_args/prior", "Raises"), ("trainer/logger", "RaisesInAList"), ("data/init_args/env", "Chained")],
)
def test_what_a_class_of_ones_own_raises_is_raised(tmp_path: Path, path: str, kind: str) -> None:
    """And not the parser's text of it, in which it may not even stand."""
    value: Any = {"class_path": f"mine_of_a_test.{kind}"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(nested(path, [value] if kind == "RaisesInAList" else value)))
    with pytest.raises(KeyError, match="nowhere") as raised:
        main([*QUICK, "--config", str(tmp_path / "mine.yaml"), "--runs_dir", str(tmp_path / "runs")])
    assert raised.value.__context__ is None or kind == "Chained"
    assert raised.traceback[-1].path.name == "mine_of_a_test.py"


@pytest.mark.usefixtures("_mine")
def test_what_a_class_of_ones_own_says_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    written = nested("trainer/logger", [{"class_path": "mine_of_a_test.Says"}])
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(written))
    assert main([*QUICK, "--config", str(tmp_path / "mine.yaml"), "--runs_dir", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "covr: trainer.logger.level is 0; it must be 1."
