"""The agent: soft actor-critic from pixels and the parts that methods are made of."""

from covr_lightning.agent.actors import GaussianActor, ResidualActor
from covr_lightning.agent.augmentations import (
    Augmentation,
    NoAugmentation,
    RandomConvolution,
    RandomCrop,
    RandomCutout,
    RandomIntensity,
    RandomShift,
    RandomTranslate,
)
from covr_lightning.agent.curl import CURL
from covr_lightning.agent.deepmdp import DeepMDP
from covr_lightning.agent.encoders import ConvTrunk, Encoder, Flare, ResActEncoder
from covr_lightning.agent.objectives import Objective
from covr_lightning.agent.priors import (
    AheadPrior,
    AnnealedPrior,
    ConstantPrior,
    DelayedPrior,
    NoPrior,
    Prior,
    SkilledPrior,
)
from covr_lightning.agent.sac import SACModule
from covr_lightning.agent.spr import SPR
from covr_lightning.agent.views import BatchViews, DrQViews, OneView, SVEAViews, Views

__all__ = [
    "CURL",
    "SPR",
    "AheadPrior",
    "AnnealedPrior",
    "Augmentation",
    "BatchViews",
    "ConstantPrior",
    "ConvTrunk",
    "DeepMDP",
    "DelayedPrior",
    "DrQViews",
    "Encoder",
    "Flare",
    "GaussianActor",
    "NoAugmentation",
    "NoPrior",
    "Objective",
    "OneView",
    "Prior",
    "RandomConvolution",
    "RandomCrop",
    "RandomCutout",
    "RandomIntensity",
    "RandomShift",
    "RandomTranslate",
    "ResActEncoder",
    "ResidualActor",
    "SACModule",
    "SVEAViews",
    "SkilledPrior",
    "Views",
]
