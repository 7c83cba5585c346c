"""What is printed or written holds no keys or passwords."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
from tensorboard.summary.writer.event_file_writer import _AsyncWriter

from covr_lightning.cli import _of_thread, _print_masked, main
from covr_lightning.secrets import MaskSecrets, masked


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("GET http://me:geheim@box:8000/v1 failed", "GET http://…@box:8000/v1 failed"),
        ("https://tok3n@host/path", "https://…@host/path"),
        ("https://host/file?token=abc123&part=2", "https://host/file?token=…&part=2"),
        ("https://host/?X-Amz-Signature=00ff&Expires=9", "https://host/?X-Amz-Signature=…&Expires=9"),
        ("api_key: abc, timeout: 3", "api_key: …, timeout: 3"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer …"),
        ("HF_TOKEN=hf_abcdefghijklmnop1234", "HF_TOKEN=…"),
        ("hf_abcdefghijklmnop1234 is not valid", "… is not valid"),
        ("WANDB_API_KEY=0123", "WANDB_API_KEY=…"),
        ("api_key: '12345678'\nname: x", "api_key: …\nname: x"),
        ("password: 'it''s p: w'", "password: …"),
        ('{"api_key": "a\\"b", "timeout": 3}', '{"api_key": …, "timeout": 3}'),
        ("{'password': 'x y'}", "{'password': …}"),
        ("covr fit --vlm.engine.api_key abc --vlm.path x", "covr fit --vlm.engine.api_key … --vlm.path x"),
        ("--trainer.logger.token 'a b' --video true", "--trainer.logger.token … --video true"),
        ("Authorization: Basic bWU6Z2VoZWlt", "Authorization: Basic …"),
        ("{'Authorization': 'Basic bWU6'}", "{'Authorization': 'Basic …'}"),
        ("http://me:p@ss@box/x", "http://…@box/x"),
    ],
)
def test_secrets_are_masked(text: str, safe: str) -> None:
    assert masked(text) == safe


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8000/v1 refuses to list its models",
        "only label tokens count: N_v = 12",
        "api_key_variable: VLLM_KEY",
        "token: null",
        "vlm.path: Qwen/Qwen2.5-VL-3B-Instruct",
        "user@host and a@b",
        "the basic settings, and a signature of three",
        "--data.token --video true",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


def test_a_log_record_is_masked_with_its_arguments() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "cannot reach %s (%d)", ("http://a:b@c", 3), None)
    assert MaskSecrets().filter(record)
    assert record.getMessage() == "cannot reach http://…@c (3)"


def test_an_error_on_the_command_line_is_masked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["fit", "--config", "quickstart.yaml", "--runs_dir", str(tmp_path), "--vlm.path", "http://a:b@c/vlm"])
    assert status == 2
    said = capsys.readouterr()
    assert "://…@c" in said.err
    assert "a:b" not in said.out + said.err + "".join(p.read_text() for p in tmp_path.rglob("*.yaml"))


def test_a_crash_is_masked(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise RuntimeError("no answer from http://me:geheim@box/api")
    except RuntimeError as error:
        _print_masked(type(error), error, error.__traceback__)
    said = capsys.readouterr().err
    assert "no answer from http://…@box/api" in said
    assert "geheim" not in said.splitlines()[-1]


def test_a_crash_of_a_thread_is_masked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no answer from http://me:geheim@box/api")

    monkeypatch.setattr(threading, "excepthook", _of_thread)
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    said = capsys.readouterr().err
    assert "RuntimeError: no answer from http://…@box/api" in said
    assert "geheim" not in said.splitlines()[-1]


def test_tensorboards_writer_leaves_the_telling_to_who_logs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", _of_thread)
    writer = _AsyncWriter(Full())
    writer._byte_queue.put(b"x")
    writer._worker.join()
    with pytest.raises(OSError, match="No space left"):
        writer.write(b"y")
    assert capsys.readouterr().err == ""
