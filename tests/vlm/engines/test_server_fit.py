"""Whole runs labelled by a server: one that dies in the middle and is there again for the resumed run; a frozen VLM."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from covr_lightning.cli import main
from tests.short_runs import SMALL_SETTINGS
from tests.vlm.engines.vllm_stub import BASE, Request, VLLMStub

SETTINGS = {
    **SMALL_SETTINGS,
    "--data.eval_every_env_steps": "6000",
    "--vlm.lora.targets": ".*text_model.*(q|v)_proj",
    "--name": "run",
}
ROUNDS = """
trainer:
  callbacks:
    - class_path: covr_lightning.callbacks.ProgressiveFineTune
      init_args:
        schedule: {SCHEDULE}
        filter: {class_path: covr_lightning.finetune.KeepAll}
        entropy_states: 16
        settings: {epochs: 1, max_steps: 2, batch_size: 4, accumulate: 1, lr: 1.0e-3, held_out: 0.2,
                   gradient_checkpointing: false}
vlm:
  engine:
    class_path: covr_lightning.vlm.VLLMServer
    init_args: {url: "URL", model: MODEL, attempts: 2, wait_s: 0.01, rest_s: 600}
"""
LINEAR = "{class_path: covr_lightning.finetune.LinearSchedule, init_args: {psi0_env_steps: 1200}}"
NEVER = "{class_path: covr_lightning.finetune.NeverSchedule}"


def fit(folder: Path, stub: VLLMStub, schedule: str, path: str, *more: str) -> int:
    config = folder / "server.yaml"
    config.write_text(ROUNDS.replace("{SCHEDULE}", schedule).replace("URL", stub.url).replace("MODEL", BASE))
    settings = [part for setting in SETTINGS.items() for part in setting]
    return main(["fit", *settings, "--config", str(config), "--runs_dir", str(folder), "--vlm.path", path, *more])


def test_a_server_that_dies_in_the_middle(
    stub: VLLMStub, untrained_vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # One question at the beginning; 25 rows in the first round, of which 5 are held out: 5 frames before training, 5
    # after it; then two batches of 8.
    left = iter(range(1 + 5 + 5 + 16))

    def answer(request: Request) -> str:
        if next(left, None) is None:
            threading.Thread(target=stub.stop).start()
            threading.Event().wait(5)  # never answers
        return f"action:[0.{0 if request.body['model'] == BASE else 5}]"

    stub.answer = answer
    assert fit(tmp_path, stub, LINEAR, str(untrained_vlm)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["env_steps"], summary["grad_steps"]) == (6000, 150 - 20 + 1)
    assert summary["labels_asked"] >= 52
    assert summary["labels_unanswered"] == summary["labels_asked"] - 16
    assert summary["labels_unparsable"] == 0
    printed = capsys.readouterr()
    assert "without an answer" in printed.out

    models = [chat.body["model"] for chat in stub.chats()]
    assert models[:6] == [BASE] * 6
    assert len(set(models[6:])) == 1
    assert models[6].startswith("run-round_001-")
    (load,) = (request.body for request in stub.requests if request.path == "/v1/load_lora_adapter")
    folder = tmp_path / "run" / "rounds" / "round_001_adapter"
    assert load == {"lora_name": models[6], "lora_path": str(folder.resolve())}

    first, second = summary["rounds"]
    assert first["unanswered_before"] == first["unanswered_after"] == first["unparsable_after"] == 0
    # |0 − a| and |0.5 − a| of the same actions.
    assert 0 < abs(first["error_before"] - first["error_after"]) <= 0.5 + 1e-6
    assert second["unanswered_before"] == second["unanswered_after"] == 1
    assert second["error_before"] is None  # NaN, which JSON does not know
    assert second["error_after"] is None
    assert second["unparsable_after"] is None
    assert len(second["losses"]) == 2
    assert "no held-out row got an answer" in second["note"]

    # Resumed with the server there again, the second round's adapter answers, which never reached it before.
    stub.requests.clear()
    stub.answer = lambda request: "action:[0.5]"
    stub.start()
    assert fit(tmp_path, stub, LINEAR, str(untrained_vlm), "--ckpt_path", "last", "--data.max_env_steps", "7000") == 0
    first_question, *later = stub.chats()
    assert first_question.body["model"] == BASE
    assert {chat.body["model"].rpartition("-")[0] for chat in later} == {"run-round_002"}
    resumed = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert resumed["labels_unanswered"] == summary["labels_unanswered"]
    assert resumed["labels_asked"] > summary["labels_asked"]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("covr_lightning.vlm.vlm.load_vlm", refuse)
    return


@pytest.mark.usefixtures("no_weights")
def test_a_frozen_vlm_s_weights_are_not_loaded(stub: VLLMStub, tmp_path: Path) -> None:
    prior = ["--model.prior", "covr_lightning.agent.ConstantPrior", "--model.prior.lam", "1"]
    assert fit(tmp_path, stub, NEVER, "org/not-here", *prior, "--data.max_env_steps", "2000") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["labels_asked"] > 0
    assert summary["labels_unanswered"] == 0
    assert len(stub.chats()) == 1 + summary["labels_asked"]
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert f"url: {stub.url}" in saved
    assert "covr_lightning.vlm.engines.vllm_server.VLLMServer" in saved or "covr_lightning.vlm.VLLMServer" in saved
