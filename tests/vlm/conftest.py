"""Tiny checkpoints, one folder per family, written once per run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.vlm.engines.vllm_stub import VLLMStub
from tests.vlm.tiny_models import write_hub_folder


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A family's folder in the hub's layout: ``hub_folder("qwen2_5_vl", tied=True)``."""
    written: dict[tuple[str, bool], Path] = {}

    def folder(family: str, tied: bool = False) -> Path:
        key = (family, tied)
        if key not in written:
            written[key] = write_hub_folder(tmp_path_factory.mktemp(family), family, tied)
        return written[key]

    return folder


@pytest.fixture
def stub() -> Iterator[VLLMStub]:
    """A server to label by."""
    with VLLMStub() as server:
        yield server
