"""Lightning callbacks: the progressive fine-tuning, what a run reports, and its progress bar."""

from covr_lightning.callbacks.checkpoints import RunCheckpoint
from covr_lightning.callbacks.evaluation import EvaluateEvery, EvaluationVideo
from covr_lightning.callbacks.profile import RunProfile
from covr_lightning.callbacks.progress import CovrProgressBar
from covr_lightning.callbacks.progressive_finetune import ProgressiveFineTune
from covr_lightning.callbacks.stopping import StopOnSignal
from covr_lightning.callbacks.summary import RunSummary
from covr_lightning.callbacks.vlm_acts import VLMActs

__all__ = [
    "CovrProgressBar",
    "EvaluateEvery",
    "EvaluationVideo",
    "ProgressiveFineTune",
    "RunCheckpoint",
    "RunProfile",
    "RunSummary",
    "StopOnSignal",
    "VLMActs",
]
