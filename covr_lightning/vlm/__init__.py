"""The VLM side: loading, prompts, action text, model inputs and the embedded tiny VLM."""

from typing import TYPE_CHECKING, Any

from covr_lightning.vlm.action_text import ActionText
from covr_lightning.vlm.decoding import Decoding
from covr_lightning.vlm.engines.engine import Engine, LocalEngine
from covr_lightning.vlm.engines.vllm_engine import VLLMEngine
from covr_lightning.vlm.engines.vllm_server import VLLMServer
from covr_lightning.vlm.inputs import VLMInputs
from covr_lightning.vlm.loading import load_vlm
from covr_lightning.vlm.prompts import Prompt, dmc_prompt, prompt_for

if TYPE_CHECKING:
    from covr_lightning.vlm.vlm import VLM, LoRA, Proposals

__all__ = [
    "VLM",
    "ActionText",
    "Decoding",
    "Engine",
    "LoRA",
    "LocalEngine",
    "Prompt",
    "Proposals",
    "VLLMEngine",
    "VLLMServer",
    "VLMInputs",
    "dmc_prompt",
    "load_vlm",
    "prompt_for",
]


def __getattr__(name: str) -> Any:
    """The VLM, and what comes with it, once asked for: it imports Lightning and PEFT."""
    if name in ("VLM", "LoRA", "Proposals"):
        from covr_lightning.vlm import vlm

        return getattr(vlm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
