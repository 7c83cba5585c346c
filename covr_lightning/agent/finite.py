"""What happens when a loss or a gradient is not a finite number."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from covr_lightning.counters import Counters
from covr_lightning.errors import ConfigError, NonFiniteError

log = logging.getLogger(__name__)

OnNonFinite = Literal["stop", "skip"]


class FiniteGuard:
    """Looks at losses and gradients before an optimizer uses them, and at rewards before they are stored.

    Observations need no look: they are bytes.

    Args:
        on_non_finite: ``"stop"`` ends the run; ``"skip"`` leaves the update, or the transition, out.

    Attributes:
        skipped: Updates and transitions left out.
    """

    def __init__(self, on_non_finite: OnNonFinite = "stop") -> None:
        if on_non_finite not in ("stop", "skip"):
            raise ConfigError(f"model.on_non_finite is {on_non_finite!r}; it can be 'stop' or 'skip'.")
        self.on_non_finite = on_non_finite
        self.skipped = 0

    def allows(self, name: str, counters: Counters, value: Tensor, parameters: Iterable[Tensor] = ()) -> bool:
        """Whether a value, and the gradients that came of it, are finite.

        Args:
            name: What it is, for the message.
            counters: The run's clock, likewise.
            value: A loss or a reward, scalar.
            parameters: Those whose gradients the optimizer is about to use.

        Raises:
            NonFiniteError: They are not, and the run is to stop.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        # A gradient's largest absolute entry is finite if and only if all its entries are.
        largest = torch.stack(torch._foreach_norm(gradients, float("inf"))).amax() if gradients else value.new_zeros(())
        if bool(torch.isfinite(value).all() & torch.isfinite(largest)):
            return True
        what = f"gradient of the {name}" if bool(torch.isfinite(value)) else name
        message = (
            f"The {what} is {'not finite' if bool(torch.isfinite(value)) else float(value)} at environment step "
            f"{counters.env_steps} (gradient step {counters.grad_steps + 1})"
        )
        if self.on_non_finite == "stop":
            raise NonFiniteError(message)
        self.skipped += 1
        log.warning("%s: left out, so far %d.", message, self.skipped)
        return False
