"""Wrong input: one sentence that names the value, the choices and the YAML key, and status 2."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from covr_lightning import doctor
from covr_lightning.cli import main, run_folder
from covr_lightning.errors import ConfigError

QUICK = ["fit", "--config", "quickstart.yaml"]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("covr: ")
    return sentence


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["fit", "--config", "quickstrt"], ["'quickstrt'", "quickstart.yaml", "--config"]),
        ([*QUICK, "--data.env.task", "cartpole-swngup"], ["'cartpole-swngup'", "cartpole-swingup", "data.env.task"]),
        ([*QUICK, "--data.batch_size", "512"], ["512", "1 to 100", "data.batch_size", "data.warmup_agent_steps"]),
        ([*QUICK, "--model.augmentation.size", "90"], ["90", "72×72", "1 to 72", "model.augmentation.size"]),
        ([*QUICK, "--data.max_env_steps", "800"], ["800", "above 800", "data.max_env_steps"]),
        ([*QUICK, "--model.gamma", "1.5"], ["1.5", "0 to 1", "model.gamma"]),
        ([*QUICK, "--ckpt_path", "nothere.ckpt"], ["nothere.ckpt", "--ckpt_path"]),
        ([*QUICK, "--seed_everything", "-1"], ["seed_everything is -1", "0 to 4294967295"]),
        ([*QUICK, "--model.alpha_betas", "[0.5, 2]"], ["model.alpha_betas", "[0.5, 2", "0 to 1"]),
        ([*QUICK, "--data.max_env_steps"], ["--data", "without a value"]),
        ([*QUICK, "--trainer.callbacks.settings.lr"], ["--trainer.callbacks", "without a value"]),
        ([*QUICK, "--trainer.callbacks.settings.lr", "-1e-4"], ["settings.lr is -0.0001", "above 0"]),
        ([*QUICK, "--model.critic_lr", "-1e-3"], ["model.critic_lr is -0.001", "above 0"]),
        ([*QUICK, "--data.seed", "-.inf"], ["data.seed is '-inf'", "an int"]),
        ([*QUICK, "--data", "{init_args: 3}"], ["data.init_args is an int", "keys"]),
        (
            [*QUICK, "--data.sampler", "torchrl.data.replay_buffers.samplers.ConsumingSampler"],
            ["data.sampler is ConsumingSampler", "RandomSampler, SamplerWithoutReplacement", "ProportionalSampler"],
        ),
        (
            [*QUICK, "--trainer.callbacks+", "covr_lightning.callbacks.ProgressiveFineTune"],
            ["trainer.callbacks has more than one ProgressiveFineTune"],
        ),
        (
            ["fit", "--config", "dmc_rad.yaml", "--trainer.callbacks.settings.lr", "1"],
            ["trainer.callbacks gives keys to a class of a config before it, but there is none"],
        ),
        (
            ["fit", "--config", "point_reach.yaml", "--model.augmentation.pad", "3"],
            ["model.augmentation needs the class_path of a kind of Augmentation", "covr_lightning.agent.RandomShift"],
        ),
        ([*QUICK, "--ckpt_path", "last", "--name", "none-such"], ["none-such", "--ckpt_path last"]),
        (
            [*QUICK, "--trainer.devices", "2", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp_spawn"],
            ["trainer.strategy", "spawns", "auto or ddp"],
        ),
        ([*QUICK, "--trainer.accelerator", "banana"], ["trainer: ", "'banana'", "cpu"]),
        ([*QUICK, "--trainer.devices", "0"], ["trainer: ", "devices='0'"]),
        ([*QUICK, "--trainer.strategy", "foo"], ["trainer: ", "'foo'"]),
        ([*QUICK, "--trainer.gradient_clip_val", "1"], ["trainer: ", "gradient_clip_val"]),
        ([*QUICK, "--trainer.max_epochs", "3"], ["trainer.max_epochs is 3", "data.max_env_steps"]),
        ([*QUICK, "--trainer.limit_val_batches", "0"], ["trainer.limit_val_batches is 0", "data.eval_episodes"]),
        ([*QUICK, "--trainer.limit_val_batches", "1"], ["trainer.limit_val_batches is 1", "data.eval_episodes"]),
        ([*QUICK, "--trainer.limit_train_batches", "1"], ["trainer.limit_train_batches is 1", "data.max_env_steps"]),
        ([*QUICK, "--trainer.limit_train_batches", "50"], ["trainer.limit_train_batches is 50", "data.max_env_steps"]),
        ([*QUICK, "--trainer.val_check_interval", "9"], ["trainer.val_check_interval is 9", "eval_every_env_steps"]),
        ([*QUICK, "--trainer.overfit_batches", "2"], ["trainer.overfit_batches is 2", "left out"]),
        (
            [*QUICK, "--trainer.precision", "bf16-true"],
            ["trainer.precision is 'bf16-true'", "'32-true' or 'bf16-mixed"],
        ),
        ([*QUICK, "--trainer.precision", "64-true"], ["trainer.precision is '64-true'", "'32-true' or"]),
        (
            [*QUICK, "--trainer.callbacks.entropy_states", "0"],
            ["entropy_states of ProgressiveFineTune is 0", "1 or more"],
        ),
        (
            [*QUICK, "--data.num_envs", "200", "--data.replay_capacity", "150"],
            ["data.replay_capacity is 150", "200 environments", "at least 200"],
        ),
        ([*QUICK, "--trainer.default_root_dir", "x"], ["trainer.default_root_dir is 'x'", "runs_dir"]),
        ([*QUICK, "--data.seed", "-1"], ["data.seed is -1", "0 to 2147483647"]),
        (
            [*QUICK, "--model.seed", "9999999999999999999999"],
            ["model.seed is 9999999999999999999999", "0 to 2147483647"],
        ),
        ([*QUICK, "--model.strides", "[2,-1]"], ["model.strides is [2, -1]", "at least 1"]),
        ([*QUICK, "--model.prior.after_rounds", "-3"], ["model.prior.after_rounds is -3", "0 or more"]),
        ([*QUICK, "--vlm.lora.rank", "0"], ["vlm.lora.rank is 0", "at least 1"]),
        ([*QUICK, "--vlm.lora.targets", "nothing"], ["vlm.lora.targets is 'nothing'", "q_proj"]),
        (["test", "--config", "quickstart.yaml"], ["`covr test`", "--ckpt_path", "--actor vlm"]),
        (["validate", "--config", "quickstart.yaml"], ["`covr validate`", "--ckpt_path"]),
        (["export", "--config", "quickstart.yaml", "--out", "x"], ["`covr export`", "--ckpt_path"]),
        (["export", "--config", "quickstart.yaml"], ["`covr export`", "--out"]),
        (["export", "--config", "quickstart.yaml", "--out=x"], ["`covr export`", "--ckpt_path"]),
        ([*QUICK, "--name", "a/b"], ["--name is 'a/b'", "one folder"]),
        (
            ["fit", "--config", "vlm_sft.yaml", "--data.rows", "x", "--ckpt_path", "last"],
            ["--ckpt_path", "vlm.adapter"],
        ),
        ([*QUICK, "--trainer.callbacks.settings.max_steps", "0"], ["settings.max_steps is 0", "-1 for no limit"]),
        ([*QUICK, "--trainer.callbacks.settings.lr", ".nan"], ["settings.lr is nan", "above 0"]),
        ([*QUICK, "--vlm.lora.targets", "(["], ["vlm.lora.targets is '(['", "no regular expression"]),
        (["fit", "--config", "learning_cpu"], ["learning_cpu is a folder", "learning_cpu/rad.yaml", "covr sweep"]),
        (["sweep", "ablations", "--confg", "x"], ["--confg", "behind `--`"]),
        (["train-embedded-vlm"], ["train-embedded-vlm", "out"]),
        (["train-embedded-vlm", "--out", "x", "--seed", "abc"], ["seed is 'abc'", "int"]),
        (["train-embedded-vlm", "--out", "."], ["--out is '.'", "report.json", "a new folder"]),
        (["doctor", "--foo"], ["`covr doctor`", "no arguments", "--foo"]),
        (["configs", "--foo"], ["`covr configs`", "--foo"]),
        (["fit"], ["--config"]),
        (["fti"], ["'fti'", "fit, validate, test"]),
    ],
)
def test_wrong_input(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    if "--config" in arguments:
        arguments = [*arguments, "--runs_dir", str(tmp_path)]
    sentence = refused(capsys, arguments)
    for part in parts:
        assert part in sentence


def test_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    sentence = refused(capsys, [*QUICK, "--runs_dir", str(tmp_path / "file")])
    assert str(tmp_path / "file" / "quickstart") in sentence
    assert "--runs_dir" in sentence


def test_a_prior_that_goes_by_what_nothing_measures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "alone.yaml"
    config.write_text(
        "base: dmc_dpl.yaml\nmodel: {init_args: {prior: {class_path: covr_lightning.agent.SkilledPrior}}}"
    )
    arguments = ["fit", "--config", str(config), "--vlm.path", "embedded", "--runs_dir", str(tmp_path)]
    sentence = refused(capsys, arguments)
    assert "SkilledPrior (model.prior)" in sentence


def test_a_checkpoint_that_is_refused_leaves_its_run_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    last, config = tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "run" / "config.yaml"
    last.write_text("no checkpoint")
    config.write_text("the run's")
    assert "last.ckpt" in refused(capsys, [*QUICK, "--ckpt_path", str(last)])
    assert config.read_text() == "the run's"


def test_vlm_folder_without_a_processor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "vlm").mkdir()
    (tmp_path / "vlm" / "config.json").write_text(json.dumps({"model_type": "idefics3"}))
    sentence = refused(capsys, [*QUICK, "--vlm.path", str(tmp_path / "vlm"), "--runs_dir", str(tmp_path / "runs")])
    assert "no processor" in sentence
    assert "vlm.path" in sentence


def test_a_prompt_of_another_action_size(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, untrained_vlm: Path
) -> None:
    prompt = json.dumps({"system": "s", "user": "u", "action_names": ["left", "right"]})
    sentence = refused(
        capsys, [*QUICK, "--vlm.prompt", prompt, "--vlm.path", str(untrained_vlm), "--runs_dir", str(tmp_path)]
    )
    for part in ("2 action values (left, right)", "cartpole-swingup takes 1", "vlm.prompt.action_names"):
        assert part in sentence
    assert not (tmp_path / "quickstart").exists(), "a run that fails while it sets up leaves no folder"


def test_a_checkpoint_of_another_task(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from covr_lightning.agent import SACModule
    from covr_lightning.envs import DMControl

    checkpoint: dict = {"state_dict": {}, "pytorch-lightning_version": "2.6.6", "loops": {}}
    SACModule(DMControl("walker-walk", size=72).spec, hidden=8).on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "walker.ckpt")
    arguments = ["test", "--config", "dmc_cartpole_swingup_cpu.yaml", "--ckpt_path", str(tmp_path / "walker.ckpt")]
    sentence = refused(capsys, [*arguments, "--runs_dir", str(tmp_path)])
    for part in ("'walker-walk'", "'cartpole-swingup'", "data.env.task", "--ckpt_path"):
        assert part in sentence


@pytest.mark.parametrize(
    "command", [["fit", "--config", "quickstart.yaml"], ["sweep", "ablations"], ["train-embedded-vlm", "--out", "x"]]
)
def test_a_broken_torchvision(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    here = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    code = f"{here}; from covr_lightning.cli import main; sys.exit(main({command}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    [sentence] = done.stderr.strip().splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence.startswith("covr: torchvision is installed but does not work with this torch (operator nms does")


@pytest.mark.parametrize("backend", ["foo", "osmesa-that-is-not-there"])
def test_no_rendering_backend(backend: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "covr_lightning.cli", "fit", "--config", "dmc_cartpole_swingup_cpu.yaml"],
        env={"PATH": "/usr/bin:/bin", "MUJOCO_GL": backend, "HOME": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"MUJOCO_GL is '{backend}'; it can be one of egl, osmesa, glfw." in done.stderr


def test_no_opengl_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from covr_lightning import rendering

    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(rendering, "_loads", lambda library: False)
    monkeypatch.setattr(rendering.sys, "platform", "linux")
    with pytest.raises(ConfigError, match="apt-get install libosmesa6"):
        rendering.choose_backend()


def test_doctor_reports_and_fails_when_the_default_job_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for part in ("a frame was rendered", "package torch", "CARLA server", "embedded VLM", "can run"):
        assert part in printed
    monkeypatch.setattr(doctor, "_RENDER", "raise SystemExit('no backend')")
    monkeypatch.setattr(doctor, "_VLM", "print('as before')")
    assert main(["doctor"]) == 1
    assert "cannot run: rendering" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("port", "says"),
    [("", "127.0.0.1:2000"), ("99999", "'99999'; it must be 1 to 65535"), ("x", "'x'; it must be 1 to 65535")],
)
def test_doctor_reads_where_carla_is(monkeypatch: pytest.MonkeyPatch, port: str, says: str) -> None:
    monkeypatch.setenv("CARLA_HOST", "")
    monkeypatch.setenv("CARLA_PORT", port)
    assert says in doctor._carla_server().detail


def test_the_recipe_asks_for_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refused(capsys, ["train-embedded-vlm"])
    assert sentence == "covr: `covr train-embedded-vlm` needs --out, the folder to write the VLM to."


def test_what_may_not_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def read_text(path: Path, *how: object, **more: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    path = tmp_path / "mine.yaml"
    path.write_text("data: {}")
    monkeypatch.setattr(Path, "read_text", read_text)  # as for another user's; tests may run as root, who may read it
    assert refused(capsys, ["fit", "--config", str(path)]) == f"covr: {path}: Permission denied."


def test_a_class_whose_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "needs_more.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class NeedsMore(Callback):\n"
        "    def __init__(self):\n"
        "        import no_such_package\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sentence = refused(
        capsys, ["fit", "--config", "point_reach.yaml", "--runs_dir", str(tmp_path / "runs"),
                 "--trainer.callbacks+=needs_more.NeedsMore"]
    )  # fmt: skip
    assert sentence == ("covr: The config names a class whose package is not there: No module named 'no_such_package'")


def test_a_class_that_says_itself_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "says_more.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "from covr_lightning.errors import ConfigError\n"
        "class SaysMore(Callback):\n"
        "    def __init__(self):\n"
        "        try:\n"
        "            import no_such_package\n"
        "        except ModuleNotFoundError as error:\n"
        "            raise ConfigError('pip install it') from error\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["fit", "--config", "point_reach.yaml", "--runs_dir", str(tmp_path / "runs")]
    assert refused(capsys, [*arguments, "--trainer.callbacks+=says_more.SaysMore"]) == "covr: pip install it"


def test_the_last_run_of_a_name_is_none_that_was_given_another(tmp_path: Path) -> None:
    for i, (folder, name) in enumerate((("exp", "exp"), ("exp-2", "exp"), ("exp-3", "exp-3"), ("exp-4", None))):
        (tmp_path / folder / "checkpoints").mkdir(parents=True)
        last = tmp_path / folder / "checkpoints" / "last.ckpt"
        last.touch()
        os.utime(last, (i, i))
        (tmp_path / folder / "config.yaml").write_text(f"name: {name or 'null'}\n")
    assert run_folder(tmp_path, "exp", "last") == tmp_path / "exp-4"
    shutil.rmtree(tmp_path / "exp-4")
    assert run_folder(tmp_path, "exp", "last") == tmp_path / "exp-2"
    assert run_folder(tmp_path, "exp-3", "last") == tmp_path / "exp-3"


def test_ctrl_c_in_any_command_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "doctor", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "covr: stopped by SIGINT.\n"


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_second_ctrl_c_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, has_checkpoint: bool
) -> None:
    def fit(trainer: L.Trainer, *given: Any, **more: Any) -> None:
        """As Lightning's, interrupted."""
        if has_checkpoint:
            (Path(trainer.default_root_dir) / "checkpoints").mkdir(parents=True)
            (Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt").touch()
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr(L.Trainer, "fit", fit)
    assert main([*QUICK, "--runs_dir", str(tmp_path)]) == 130
    hint = "; to go on, run the same command with --ckpt_path last" * has_checkpoint
    assert capsys.readouterr().err.splitlines()[-1] == f"covr: stopped by SIGINT{hint}."


def test_one_callback_and_no_objectives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", "dmc_sac.yaml", "--config", "point_reach.yaml", "--runs_dir", str(tmp_path), "--name", "run"]
    short = ["--data.max_env_steps", "202", "--data.eval_episodes", "1"]
    profile = "{class_path: covr_lightning.callbacks.profile.RunProfile, init_args: {show: true}}"
    assert main(["fit", *config, *short, "--trainer.callbacks", profile, "--model.objectives", "null"]) == 0
    assert re.search(r"Where [\d.]+ s went", capsys.readouterr().out)


def test_a_checkpoint_is_of_its_run_from_wherever_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    for folder, path in ((".", "a/checkpoints/x"), ("a", "checkpoints/x"), ("a/checkpoints", "x")):
        monkeypatch.chdir(tmp_path / folder)
        assert run_folder(tmp_path, "b", path) == tmp_path / "a"


def test_run_folders(tmp_path: Path) -> None:
    assert run_folder(tmp_path, "a", None) == tmp_path / "a"
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    assert run_folder(tmp_path, "a", None) == tmp_path / "a-2"
    (tmp_path / "a" / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "ab" / "checkpoints").mkdir(parents=True)
    (tmp_path / "ab" / "checkpoints" / "last.ckpt").touch()  # another run's
    assert run_folder(tmp_path, "a", "last") == tmp_path / "a"
    last = str(tmp_path / "a" / "checkpoints" / "last.ckpt")
    assert run_folder(tmp_path, "b", last) == tmp_path / "a"
    assert run_folder(tmp_path, "a", last, anew=True) == tmp_path / "a"
    assert run_folder(tmp_path, "b", last, anew=True) == tmp_path / "b"
    (tmp_path / "a[1]" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a[1]" / "checkpoints" / "last.ckpt").touch()
    assert run_folder(tmp_path, "a[1]", "last") == tmp_path / "a[1]"


def test_help_version_and_configs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "covr COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert main(["configs"]) == 0
    assert "quickstart.yaml" in capsys.readouterr().out
    for command in ("doctor", "configs", "export"):
        assert main([command, "--help"]) == 0
        assert "usage: covr" in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "covr_lightning.cli", "configs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.wait() == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""


def test_a_native_crash_says_where_python_was() -> None:
    code = "from covr_lightning.cli import main; main(['--version']); import os; os.kill(os.getpid(), 11)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGSEGV
    assert "most recent call first" in done.stderr


def test_the_command_line_sets_how_threads_wait_before_pytorch_is_there() -> None:
    # OpenMP reads it when PyTorch is imported.
    code = "import sys, covr_lightning.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
