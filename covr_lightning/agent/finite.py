"""What happens when a loss or a gradient is not a finite number."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from covr_lightning.counters import Counters
from covr_lightning.errors import ConfigError, NonFiniteError

log = logging.getLogger(__name__)

OnNonFinite = Literal["stop", "skip"]

#: Optimizer steps on a GPU after which the host reads what became of one: by then it is known, and nobody waits.
LATER = 8


@dataclass(frozen=True)
class _Seen:
    """What was seen of an optimizer step, on its way to the host.

    Attributes:
        name: What was looked at.
        counters: The run's clock then.
        values: The loss, and the largest absolute entry of the gradients.
        arrived: CUDA event after which `values` can be read; None where it can be at once.
    """

    name: str
    counters: Counters
    values: Tensor
    arrived: Any


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
        self._later: deque[_Seen] = deque()
        self._recorded: list[tuple[str, Tensor]] | None = None

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
        return self._judge(_Seen(name, counters, _loss_and_gradient(value, parameters), None))

    def step(
        self, optimizer: Any, name: str, counters: Counters, loss: Tensor, parameters: Iterable[Tensor] = ()
    ) -> None:
        """One step of an optimizer, if :meth:`allows` it.

        A GPU decides by itself, so that the host need not wait for it: its fused optimizer leaves a step out, and
        what :meth:`allows` would have done happens a few steps later, or in :meth:`settle`.

        Args:
            optimizer: On a GPU a fused one, perhaps in Lightning's wrapper.
            name: See :meth:`allows`.
            counters: Likewise.
            loss: The loss, scalar.
            parameters: The optimizer's.
        """
        if loss.device.type != "cpu":
            self.step_on_device(optimizer, name, counters, loss, parameters)
        elif self.allows(name, counters, loss, parameters):
            optimizer.step()

    def step_on_device(
        self, optimizer: Any, name: str, counters: Counters, loss: Tensor, parameters: Iterable[Tensor] = ()
    ) -> None:
        """What :meth:`step` does on a GPU."""
        values = _loss_and_gradient(loss, parameters)
        fused = getattr(optimizer, "optimizer", optimizer)
        fused.found_inf = (~torch.isfinite(values).all()).to(torch.float32)
        optimizer.step()
        fused.found_inf = None
        if self._recorded is None:
            self.seen(name, counters, values)
        else:
            self._recorded.append((name, values))

    def seen(self, name: str, counters: Counters, values: Tensor) -> None:
        """Take note of what an optimizer step on a GPU looked at; it is judged a few steps later.

        Args:
            name: See :meth:`allows`.
            counters: Likewise.
            values: The loss, and the largest absolute entry of the gradients, (2,).
        """
        while len(self._later) >= LATER:
            self._judge(self._later.popleft())
        at_host = values.to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None
        self._later.append(_Seen(name, replace(counters), at_host, arrived))

    @contextmanager
    def recording(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Only collect names and values, while a CUDA graph is captured; whoever replays it calls :meth:`seen`."""
        self._recorded = []
        try:
            yield self._recorded
        finally:
            self._recorded = None

    def settle(self) -> None:
        """Do now what :meth:`step` has put off; called before a run is saved."""
        while self._later:
            self._judge(self._later.popleft())

    def _judge(self, seen: _Seen) -> bool:
        """Whether all that was seen is finite; if not, stop or count."""
        if seen.arrived is not None:
            seen.arrived.synchronize()
        loss, largest = seen.values.tolist()
        if math.isfinite(loss) and math.isfinite(largest):
            return True
        what = f"gradient of the {seen.name}" if math.isfinite(loss) else seen.name
        message = (
            f"The {what} is {'not finite' if math.isfinite(loss) else loss} at environment step "
            f"{seen.counters.env_steps} (gradient step {seen.counters.grad_steps + 1})"
        )
        if self.on_non_finite == "stop":
            raise NonFiniteError(message)
        self.skipped += 1
        log.warning("%s: left out, so far %d.", message, self.skipped)
        return False


def _loss_and_gradient(value: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """A value, and the largest absolute entry of the gradients (finite if and only if all entries are), as (2,)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        largest = value.new_zeros(())
    elif value.device.type == "cpu":  # a seventh of the time that the norm takes there
        largest = torch.stack([extreme for g in gradients for extreme in torch.aminmax(g)]).abs().amax()
    else:
        largest = torch.stack(torch._foreach_norm(gradients, float("inf"))).amax()
    return torch.stack([value.reshape(()), largest])
