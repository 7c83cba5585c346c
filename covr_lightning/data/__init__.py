"""The agent's experience: collecting it, keeping it, labelling it, handing it out."""

from covr_lightning.data.collection import OneCollector
from covr_lightning.data.datamodule import ExperienceData
from covr_lightning.data.exploration import ExplorationPolicy
from covr_lightning.data.frame_storage import FrameStackStorage
from covr_lightning.data.labels import LabelQueue
from covr_lightning.data.proportional_sampler import ProportionalSampler
from covr_lightning.data.ray_workers import RayWorkers
from covr_lightning.data.recent_sampler import EmphasizingRecentSampler
from covr_lightning.data.return_sampler import ReturnSampler
from covr_lightning.data.workers import AsyncWorkers, SyncWorkers

__all__ = [
    "AsyncWorkers",
    "EmphasizingRecentSampler",
    "ExperienceData",
    "ExplorationPolicy",
    "FrameStackStorage",
    "LabelQueue",
    "OneCollector",
    "ProportionalSampler",
    "RayWorkers",
    "ReturnSampler",
    "SyncWorkers",
]
