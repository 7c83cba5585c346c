"""The embedded tiny VLM: what it learns to read, its recipe, and its shipped weights."""

from covr_lightning.vlm.embedded.evaluation import evaluate_embedded_vlm
from covr_lightning.vlm.embedded.recipe import Recipe, train_embedded_vlm

__all__ = ["Recipe", "evaluate_embedded_vlm", "train_embedded_vlm"]
