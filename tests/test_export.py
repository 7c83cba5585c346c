"""The exported policy gives the module's actions, needs nothing of this package, and is small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from covr_lightning.agent import NoAugmentation, RandomCrop, RandomTranslate, ResActEncoder, ResidualActor, SACModule
from covr_lightning.agent.augmentations import Augmentation
from covr_lightning.cli import main
from covr_lightning.envs import EnvSpec, Road
from covr_lightning.errors import ConfigError
from covr_lightning.export import export_policy, open_policy

pytest.importorskip("onnxruntime", reason='needs pip install "covr_lightning[export]"')

ALONE = """
import sys, numpy as np, torch, onnxruntime
folder, frames = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
program = torch.export.load(folder + "/policy.pt2").module()
session = onnxruntime.InferenceSession(folder + "/policy.onnx")
onnx = session.run(None, {"pixels": frames.numpy()})[0]
assert not any(name.startswith("covr_lightning") for name in sys.modules)
torch.save({"pt2": program(frames).detach(), "onnx": torch.from_numpy(np.asarray(onnx))}, sys.argv[3])
"""


@pytest.mark.parametrize("augmentation", [NoAugmentation(), RandomCrop(24), RandomTranslate(36)])
def test_files_give_the_modules_actions_in_a_process_without_this_package(
    augmentation: Augmentation, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    agent = SACModule(EnvSpec("x", 30, 30, 3, 2, 4, 100), augmentation=augmentation, filters=4, hidden=16, latent=8)
    files = export_policy(agent, tmp_path)
    assert [file.path.name for file in files] == ["policy.pt2", "policy.onnx"]
    assert all(0 <= file.difference <= 1e-4 for file in files)
    frames = torch.randint(0, 256, (7, 9, 30, 30), dtype=torch.uint8)
    torch.save(frames, tmp_path / "frames.pt")
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path), str(tmp_path / "frames.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    actions = torch.load(tmp_path / "out.pt", weights_only=True)
    wanted = agent.act(frames, deterministic=True)
    for name in ("pt2", "onnx"):
        torch.testing.assert_close(actions[name], wanted, atol=1e-4, rtol=0)
    assert wanted.std() > 1e-4  # frames make a difference


def test_an_actor_that_reads_its_previous_action_takes_a_second_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec, parts = EnvSpec("x", 30, 30, 4, 2, 4, 100), {"encoder": ResActEncoder(), "actor_head": ResidualActor()}
    agent = SACModule(spec, filters=4, hidden=16, latent=8, **parts)
    files = export_policy(agent, tmp_path)
    assert all(0 <= file.difference <= 1e-4 for file in files)
    frames, before = torch.randint(0, 256, (5, 12, 30, 30), dtype=torch.uint8), torch.rand(5, 2)
    program = torch.export.load(files[0].path).module()
    torch.testing.assert_close(program(frames, before), agent.act(frames, True, previous_action=before))
    assert program(frames, before).numpy().shape == (len(frames), agent.spec.action_dim)  # it takes no gradients
    assert all(parameter.requires_grad for parameter in agent.actor.parameters())  # the agent still does
    for file in files:  # without a previous action it is zero, as at an episode's first step
        run, shape = open_policy(file.path, torch.device("cpu"))
        assert shape == (12, 30, 30)
        torch.testing.assert_close(torch.as_tensor(run(frames)), agent.act(frames, True), atol=1e-4, rtol=0)


def test_the_driving_policy_at_full_size_is_small(tmp_path: Path) -> None:
    files = export_policy(SACModule(Road("highway").spec, strides=(2, 2, 2, 2)), tmp_path)
    assert max(file.megabytes for file in files) <= 10


def test_covr_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"data.env.size": 40, "model.augmentation.size": 32, "model.hidden": 16, "model.filters": 4}
    sizes |= {"data.env.action_repeat": 100, "data.warmup_agent_steps": 8, "data.batch_size": 8}
    command = ["--config", "dmc_cartpole_swingup_cpu.yaml", "--runs_dir", str(tmp_path), "--name", "run"]
    command += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    short = {"data.max_env_steps": 1500, "data.eval_episodes": 1, "trainer.enable_progress_bar": "false"}
    assert main(["fit", *command, *[part for n, v in short.items() for part in (f"--{n}", str(v))]]) == 0
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    assert main(["export", *command, "--ckpt_path", last, "--out", str(tmp_path / "policy")]) == 0
    printed = capsys.readouterr().out
    assert "policy.pt2" in printed
    assert "policy.onnx" in printed
    assert "ms an action" in printed
    state = torch.load(last, weights_only=True)["state_dict"]
    weights = torch.export.load(tmp_path / "policy" / "policy.pt2").state_dict
    assert torch.equal(weights["projection.linear.weight"], state["actor_projection.linear.weight"])

    by_its_name = [part for part in command if part not in ("--name", "run")]
    (tmp_path / "run").rename(tmp_path / "dmc_cartpole_swingup_cpu")
    assert main(["export", *by_its_name, "--ckpt_path", "last", "--out", str(tmp_path / "named")]) == 0
    assert (tmp_path / "named" / "policy.pt2").is_file()
    (tmp_path / "dmc_cartpole_swingup_cpu").rename(tmp_path / "run")

    assert main(["export", *command, "--model.hidden", "8", "--ckpt_path", last, "--out", str(tmp_path / "x")]) == 2
    assert "is of other networks (YAML key model): critic.q1.0.weight is (16, 51) there" in capsys.readouterr().err
    assert main(["export", *command, "--ckpt_path", last]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["export", *command, "--out", str(tmp_path)]) == 2
    assert "--ckpt_path" in capsys.readouterr().err
    assert main(["export", *command, "--ckpt_path", str(tmp_path / "none.ckpt"), "--out", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err


def test_what_was_exported_before_stays_until_the_new_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = SACModule(EnvSpec("x", 30, 30, 3, 2, 4, 100), filters=4, hidden=16, latent=8)
    for name in ("policy.pt2", "policy.onnx"):
        (tmp_path / name).write_bytes(b"before")
    with monkeypatch.context() as patch:
        patch.setattr("covr_lightning.export.TOLERANCE", -1.0)
        with pytest.raises(RuntimeError, match=r"policy\.pt2 differs"):
            export_policy(agent, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "policy.pt2": b"before", "policy.onnx": b"before",
    }  # fmt: skip
    assert [file.path for file in export_policy(agent, tmp_path)] == [tmp_path / "policy.pt2", tmp_path / "policy.onnx"]
    assert all(path.read_bytes() != b"before" for path in tmp_path.iterdir())
    (tmp_path / "policy.onnx").unlink()
    (tmp_path / "policy.onnx").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be written to .* \(Is a directory\); give another --out"):
        export_policy(agent, tmp_path)


def test_the_folder_to_export_to_may_be_named_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--out"], ["--config", "quickstart.yaml"], ["--out="]):
        assert main(["export", *arguments]) == 2
        assert "`covr export` needs --out" in capsys.readouterr().err
    assert main(["export", "--out", "a", "--out=b"]) == 2
    assert "`covr export` needs --config" in capsys.readouterr().err
