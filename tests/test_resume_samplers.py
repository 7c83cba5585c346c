"""Runs with samplers and objectives that have a state of their own are resumed exactly, too."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from covr_lightning.agent import SACModule
from covr_lightning.cli import main
from covr_lightning.data import ExperienceData
from tests.test_methods import SMALL
from tests.test_resume import SignalOnce, assert_same_run, at_env_step

#: Episodes of 10 agent steps, 60 agent steps in all, more than the replay holds; the second evaluation is at the end.
SETTINGS = SMALL | {
    "data.env.size": "40", "model.augmentation.size": "32", "model.objectives.sequences": "4",
    "model.objectives.jumps": "3", "data.max_env_steps": "6000", "data.replay_capacity": "40",
}  # fmt: skip
PER = ["data.sampler", "covr_lightning.data.ProportionalSampler"]
ERE = ["data.sampler", "covr_lightning.data.EmphasizingRecentSampler", "data.sampler.c_min", "4"]
BY_RETURN = ["data.sampler", "covr_lightning.data.ReturnSampler"]


def fit(folder: Path, sampler: list[str], *more: str) -> int:
    settings = SETTINGS | dict(zip(sampler[::2], sampler[1::2], strict=True))
    command = ["--config", "dmc_spr.yaml", "--runs_dir", str(folder), "--name", "run"]
    return main(["fit", *command, *(part for name, v in settings.items() for part in (f"--{name}", v)), *more])


@pytest.mark.parametrize(
    ("sampler", "envs"), [(PER, 1), (ERE, 2), (BY_RETURN, 1)], ids=["PER and SPR", "ERE and SPR", "returns and SPR"]
)
def test_a_stopped_run_ends_as_one_that_was_not(
    sampler: list[str], envs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--data.num_envs", str(envs))
    assert fit(tmp_path / "through", sampler, *more) == 0
    resume: tuple[str, ...] = ()
    for step in (1200, 5000):  # after four updates, and with a ring that has turned
        with monkeypatch.context() as patched:
            stop = SignalOnce(signal.SIGTERM, at_env_step(step), ExperienceData._store)
            stop.patch(patched, ExperienceData, "_store")
            assert fit(tmp_path / "stopped", sampler, *more, *resume) == 143
            assert stop.sent
        torch.rand(3)
        resume = ("--ckpt_path", "last")
    assert fit(tmp_path / "stopped", sampler, *more, *resume) == 0
    assert_same_run(tmp_path / "stopped" / "run", tmp_path / "through" / "run", rounds_trained=0)
    state = torch.load(tmp_path / "through" / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    (mine,) = state["ExperienceData"]["processes"]
    assert mine["sequences"]["rng"].dtype == torch.uint8
    if sampler is PER:
        p = mine["sampler"]["p"]
        assert len(p) == 40
        assert len(p.unique()) > 10
    assert all(v.isfinite().all() for v in state["state_dict"].values())


def test_sequences_leave_the_critics_batches_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[torch.Tensor]] = {"with": [], "without": []}
    original = SACModule.training_step
    for name, objectives in (("with", []), ("without", ["--model.objectives", "[]"])):

        def step(module: SACModule, batch, batch_idx: int = 0, name: str = name) -> None:
            if not batch.is_empty():
                assert ("sequences" in batch) == (name == "with")
                drawn[name].append(batch["index"].clone())
            original(module, batch, batch_idx)

        with monkeypatch.context() as patched:
            patched.setattr(SACModule, "training_step", step)
            settings = {k: v for k, v in SETTINGS.items() if objectives == [] or "objectives" not in k}
            command = ["--config", "dmc_spr.yaml", "--runs_dir", str(tmp_path), "--name", name, *objectives]
            assert main(["fit", *command, *(part for k, v in settings.items() for part in (f"--{k}", v))]) == 0
    assert len(drawn["with"]) == 53
    assert all(torch.equal(a, b) for a, b in zip(drawn["with"], drawn["without"], strict=True))


def test_priorities_begin_anew_with_other_environments(tmp_path: Path) -> None:
    assert fit(tmp_path, PER, "--data.max_env_steps", "3000") == 0
    more = ("--data.num_envs", "2", "--data.max_env_steps", "4000", "--ckpt_path", "last")
    assert fit(tmp_path, PER, *more) == 0
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    p = state["ExperienceData"]["processes"][0]["sampler"]["p"]
    assert (p[:30] > 0).all()  # the rows that were dealt out, which are drawn like all others
    assert state["ExperienceData"]["counters"]["agent_steps"] == 40
