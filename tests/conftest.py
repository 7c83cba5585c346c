"""Shared fixtures. Everything runs without network, GPU and CARLA server."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("absl").setLevel(logging.ERROR)

from covr_lightning.rendering import choose_backend  # noqa: E402
from tests import forked  # noqa: E402

choose_backend()

# A shell starts its background jobs with Ctrl-C ignored, and their children inherit that; here it must have its effect.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def nothing_forked_stays() -> Iterator[None]:
    """A process that a test has started does not outlive it."""
    yield
    forked.end_all()


#: Files that take longest. They begin first, so that in the end no process of the tests waits long for the other.
LONGEST = (
    "test_data_parallel.py", "test_resume.py", "test_several_processes.py", "test_run_config.py", "test_embedded.py",
    "test_workers.py", "test_learning.py", "test_memory.py", "test_end_to_end.py", "test_agent_ddp.py",
    "test_resume_samplers.py", "test_process.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first; GPU tests say why they do not run."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="session")
def untrained_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the embedded VLM's architecture and random weights."""
    from covr_lightning.vlm.embedded.model import build_model, build_processor, build_tokenizer
    from covr_lightning.vlm.embedded.questions import training_corpus
    from covr_lightning.vlm.embedded.scenes import embedded_scenes

    folder = tmp_path_factory.mktemp("untrained_vlm")
    tokenizer = build_tokenizer(training_corpus(embedded_scenes()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(tokenizer)
    model.save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    return folder
