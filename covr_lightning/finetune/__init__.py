"""From the agent's experience to a better VLM: D_f, what is chosen from it, how it is weighted, and the fine-tuning."""

from covr_lightning.finetune.episodes import EpisodeBuffer, discounted_returns
from covr_lightning.finetune.filters import EDDF, Filter, KeepAll, RandomSubset, TopFraction
from covr_lightning.finetune.launch import SeparateLaunch
from covr_lightning.finetune.loss import ralw_loss
from covr_lightning.finetune.module import FineTuneSettings, VLMFineTuner
from covr_lightning.finetune.round import RoundReport, fine_tune_round
from covr_lightning.finetune.saved_rows import SavedRows
from covr_lightning.finetune.schedules import GivenSchedule, LinearSchedule, NeverSchedule, PrintedSchedule, Schedule
from covr_lightning.finetune.scores import QScore, ReturnScore, RewardScore, Score
from covr_lightning.finetune.training import train_adapter
from covr_lightning.finetune.weights import RALW, RandomWeight, ScoreAsWeight, UniformWeight, Weight

__all__ = [
    "EDDF",
    "RALW",
    "EpisodeBuffer",
    "Filter",
    "FineTuneSettings",
    "GivenSchedule",
    "KeepAll",
    "LinearSchedule",
    "NeverSchedule",
    "PrintedSchedule",
    "QScore",
    "RandomSubset",
    "RandomWeight",
    "ReturnScore",
    "RewardScore",
    "RoundReport",
    "SavedRows",
    "Schedule",
    "Score",
    "ScoreAsWeight",
    "SeparateLaunch",
    "TopFraction",
    "UniformWeight",
    "VLMFineTuner",
    "Weight",
    "discounted_returns",
    "fine_tune_round",
    "ralw_loss",
    "train_adapter",
]
