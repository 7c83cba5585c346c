"""How the VLM's actions pull the policy: the term that Eq. 4 adds to the actor's loss, λ‖a_v − a_r‖²."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor

from covr_lightning import processes
from covr_lightning.counters import Counters
from covr_lightning.errors import ConfigError, check_not_negative

#: What of the policy is pulled.
Action = Literal["sample", "mean"]
#: What the mean of Eq. 4's squared distance is taken over.
MeanOver = Literal["labelled", "batch"]


def imitation_error(
    a_r: Tensor, a_v: Tensor, valid: Tensor, mean_over: MeanOver = "labelled", counted: Tensor | None = None
) -> Tensor:
    """Mean of ‖a_v − a_r‖², summed over action dimensions (Eq. 4).

    Args:
        a_r: Policy's actions (B, A), with gradient.
        a_v: VLM's actions (B, A); rows without a label may hold anything finite.
        valid: Which rows have a label (B,) or (B, 1) bool.
        mean_over: ``"labelled"``: over the rows that have a label. ``"batch"``: over all B, of which those without a
            label add 0.
        counted: Which rows' distance counts (B,) or (B, 1) bool; the others add 0 to the same mean. All by default.

    Returns:
        Scalar; 0 where no row is labelled. In several processes the mean of their scalars is that of the joined batch.
    """
    mask = valid.reshape(-1).to(a_r.dtype)
    squared = (a_v - a_r).square().sum(-1)
    if counted is not None:
        squared = squared * counted.reshape(-1)
    if mean_over == "batch":
        return (squared * mask).sum() / len(mask)
    # Every process divides by the same: its own number of labels would give each process's rows another weight.
    return (squared * mask).sum() / processes.mean(mask.sum()).clamp(min=1 / processes.count())


class Prior(ABC):
    """A weight λ that may change over time, on Eq. 4's squared distance.

    Args:
        action: What of the policy is pulled: a fresh reparameterised ``"sample"``, or the ``"mean"`` action tanh μ.
        mean_over: What the distance is averaged over. ``"labelled"``: the rows that have an answer of the VLM, so that
            the pull is the same however few they are. ``"batch"``: all rows, so that it grows with the share that has
            one, and a row with an answer is pulled by λ where Q counts once.
        q_filter: Count the distance on those rows alone where the critics think more of the VLM's action than of the
            policy's, min Q(s, a_v) > min Q(s, a_r), as Nair et al. (2018) do with demonstrations; not in the paper. The
            mean is over the same rows as without. By default every answer counts, as in Eq. 4.

    Attributes:
        uses_vlm: Whether a VLM is needed at all.
        needs_measure: Whether it must be told by :meth:`measured` how good the VLM is.
        needs_vlm_return: Whether it must be told by :meth:`vlm_acted` what the VLM returns.
    """

    uses_vlm: bool = True
    needs_measure: bool = False
    needs_vlm_return: bool = False
    action: Action = "sample"
    mean_over: MeanOver = "labelled"
    q_filter: bool = False

    def __init__(self, action: Action = "sample", mean_over: MeanOver = "labelled", q_filter: bool = False) -> None:
        for name, value, choices in (("action", action, Action), ("mean_over", mean_over, MeanOver)):
            if value not in get_args(choices):
                raise ConfigError(
                    f"model.prior.{name} is {value!r}; it can be {' or '.join(map(repr, get_args(choices)))}."
                )
        self.action = action
        self.mean_over = mean_over
        self.q_filter = q_filter

    @abstractmethod
    def weight(self, counters: Counters) -> float:
        """λ at this moment."""

    def wants_labels(self, counters: Counters) -> bool:
        """Whether the VLM should be asked now: by default, whenever its answers count."""
        return self.weight(counters) > 0

    def measured(  # noqa: B027 (most priors do not mind)
        self, error: float, error_constant: float, unparsable: float = 0.0
    ) -> None:
        """A fine-tune round has measured the VLM; a resumed run is told its last round's figures again.

        Args:
            error: The VLM's mean absolute error after the round on those held-out rows whose answers could be parsed;
                NaN without any.
            error_constant: That of the constant predictor on the same rows.
            unparsable: Share of the answers that could not be parsed; NaN if there was none at all.
        """

    def vlm_acted(self, vlm_return: float) -> None:  # noqa: B027
        """The VLM has acted alone after a fine-tune round; a resumed run is told of its rounds again.

        Args:
            vlm_return: Its mean return.
        """

    def evaluated(self, policy_return: float) -> None:  # noqa: B027
        """The policy has been evaluated; a resumed run is told of its newest evaluation again.

        Args:
            policy_return: Its mean return.
        """

    def loss(
        self, a_r: Tensor, a_v: Tensor, valid: Tensor, lam: float | Tensor, preferred: Tensor | None = None
    ) -> Tensor:
        """λ times the squared distance to the VLM's actions.

        Args:
            a_r: (B, A), the sample or the mean, as `action` says.
            a_v: (B, A).
            valid: (B,) or (B, 1) bool.
            lam: λ; a tensor where a CUDA graph is to read it anew each time, and then not 0.
            preferred: With `q_filter`, the rows whose a_v the critics prefer (B,) or (B, 1) bool.
        """
        if not isinstance(lam, Tensor) and lam == 0:
            return torch.zeros((), device=a_r.device)
        return lam * imitation_error(a_r, a_v, valid, self.mean_over, preferred)


class NoPrior(Prior):
    """No guidance: the plain agent."""

    uses_vlm = False

    def weight(self, counters: Counters) -> float:
        """Always 0."""
        return 0.0


class ConstantPrior(Prior):
    """A constant λ from the start (the paper's DPL baseline, with a frozen VLM).

    Args:
        lam: λ.
        action: See :class:`Prior`.
        mean_over: See :class:`Prior`.
        q_filter: See :class:`Prior`.
    """

    def __init__(
        self,
        lam: float = 1.0,
        action: Action = "sample",
        mean_over: MeanOver = "labelled",
        q_filter: bool = False,
    ) -> None:
        super().__init__(action, mean_over, q_filter)
        self.lam = check_not_negative("model.prior.lam", lam)

    def weight(self, counters: Counters) -> float:
        """λ."""
        return self.lam


class DelayedPrior(Prior):
    """COVR's guidance: λ = 0 until `after_rounds` fine-tune rounds are over, constant from then on.

    A round that kept too few rows to train on counts like any other.

    Args:
        lam: λ. Paper: 1 on DMControl, 2 on CARLA.
        after_rounds: Rounds to wait for. Paper: 4 on DMControl, 2 on CARLA's highway.
        action: See :class:`Prior`.
        label_early: Ask the VLM before guidance starts as well. The answers then come from the base VLM and stay.
        mean_over: See :class:`Prior`.
        q_filter: See :class:`Prior`.
    """

    def __init__(
        self,
        lam: float = 1.0,
        after_rounds: int = 4,
        action: Action = "sample",
        label_early: bool = False,
        mean_over: MeanOver = "labelled",
        q_filter: bool = False,
    ) -> None:
        super().__init__(action, mean_over, q_filter)
        self.lam = check_not_negative("model.prior.lam", lam)
        self.after_rounds = int(check_not_negative("model.prior.after_rounds", after_rounds))
        self.label_early = label_early

    @property
    def share(self) -> float:
        """What of λ counts, by how good the VLM is: here all of it."""
        return 1.0

    def weight(self, counters: Counters) -> float:
        """λ · share once enough rounds are done."""
        return self.lam * self.share if counters.rounds >= self.after_rounds else 0.0

    def wants_labels(self, counters: Counters) -> bool:
        """From the first round that counts, while the share is not 0, or always with `label_early`.

        With λ = 0 as well, to compare runs.
        """
        return self.label_early or (counters.rounds >= self.after_rounds and self.share > 0)


class SkilledPrior(DelayedPrior):
    """COVR's guidance in the measure of what the VLM has learnt: λ · max(0, 1 − e / e_const). Not in the paper.

    e and e_const are the errors of the VLM and of the constant predictor on the held-out rows of the last round that
    measured them; 1 − e / e_const is a forecast's skill score. It counts for the share of answers that could be parsed;
    the others know nothing. A VLM that is no better than a constant does not guide, and is not asked either, except
    with `label_early`.

    Args:
        lam: λ of a VLM without error.
        after_rounds: See :class:`DelayedPrior`.
        action: See :class:`Prior`.
        label_early: See :class:`DelayedPrior`.
        mean_over: See :class:`Prior`.
        q_filter: See :class:`Prior`.

    Attributes:
        skill: That of the last round that was measured; 0 before.
    """

    needs_measure = True
    skill: float = 0.0

    def measured(self, error: float, error_constant: float, unparsable: float = 0.0) -> None:
        """Take over the skill of the round, if it measured one."""
        if math.isfinite(error) and math.isfinite(error_constant):
            of_parsed = max(0.0, 1 - error / error_constant) if error_constant > 0 else 0.0
            self.skill = of_parsed * (1 - unparsable if math.isfinite(unparsable) else 1.0)
        elif unparsable == 1:  # it was asked, and nothing that it said is an action
            self.skill = 0.0

    @property
    def share(self) -> float:
        """The skill."""
        return self.skill


class AheadPrior(DelayedPrior):
    """COVR's guidance while there is something to be learnt from the VLM: λ as long as it is ahead. Not in the paper.

    It is ahead while it returned more, acting alone after the newest round (``vlm_episodes`` of ProgressiveFineTune),
    than the policy did in its newest evaluation. A policy that has passed its VLM is held back by it no longer, and the
    VLM is not asked until a round has brought it ahead again, except with `label_early`.

    Args:
        lam: λ while the VLM is ahead.
        after_rounds: Rounds to wait for, as in :class:`DelayedPrior`; here 1, so that it begins with the first return.
        action: See :class:`Prior`.
        label_early: See :class:`DelayedPrior`.
        mean_over: See :class:`Prior`.
        q_filter: See :class:`Prior`.

    Attributes:
        vlm_return: Of the newest round in which the VLM acted alone; −∞ before.
        policy_return: Of the newest evaluation; −∞ before.
    """

    needs_vlm_return = True
    vlm_return: float = -math.inf
    policy_return: float = -math.inf

    def __init__(
        self,
        lam: float = 1.0,
        after_rounds: int = 1,
        action: Action = "sample",
        label_early: bool = False,
        mean_over: MeanOver = "labelled",
        q_filter: bool = False,
    ) -> None:
        super().__init__(lam, after_rounds, action, label_early, mean_over, q_filter)

    def vlm_acted(self, vlm_return: float) -> None:
        """Take over the VLM's return."""
        self.vlm_return = vlm_return

    def evaluated(self, policy_return: float) -> None:
        """Take over the policy's return."""
        self.policy_return = policy_return

    @property
    def share(self) -> float:
        """1 while the VLM returned more than the policy, otherwise 0."""
        return float(self.vlm_return > self.policy_return)


class AnnealedPrior(Prior):
    """λ falls in steps from `start` to `floor` (the paper's APL baseline, with a frozen VLM).

    λ = max(floor, start − decrement·⌊env_steps / every_env_steps⌋).

    Args:
        start: First λ.
        decrement: What each step takes off.
        every_env_steps: Length of a step in environment steps.
        floor: Smallest λ.
        action: See :class:`Prior`.
        mean_over: See :class:`Prior`.
        q_filter: See :class:`Prior`.
    """

    def __init__(
        self,
        start: float = 2.0,
        decrement: float = 0.01,
        every_env_steps: int = 200,
        floor: float = 0.1,
        action: Action = "sample",
        mean_over: MeanOver = "labelled",
        q_filter: bool = False,
    ) -> None:
        super().__init__(action, mean_over, q_filter)
        self.start = check_not_negative("model.prior.start", start)
        self.decrement = check_not_negative("model.prior.decrement", decrement)
        if every_env_steps < 1:
            raise ConfigError(f"model.prior.every_env_steps is {every_env_steps}; it must be 1 or more.")
        self.floor, self.every_env_steps = check_not_negative("model.prior.floor", floor), every_env_steps
        if floor > start:
            raise ConfigError(f"model.prior.floor is {floor}; it must not be above model.prior.start, {start}.")

    def weight(self, counters: Counters) -> float:
        """λ at this environment step."""
        return max(self.floor, self.start - self.decrement * (counters.env_steps // self.every_env_steps))
