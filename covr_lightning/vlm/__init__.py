"""The VLM side: loading, prompts, action text, model inputs and the embedded tiny VLM."""

from covr_lightning.vlm.action_text import ActionText
from covr_lightning.vlm.inputs import VLMInputs
from covr_lightning.vlm.loading import load_vlm
from covr_lightning.vlm.prompts import Prompt, dmc_prompt, prompt_for

__all__ = ["ActionText", "Prompt", "VLMInputs", "dmc_prompt", "load_vlm", "prompt_for"]
