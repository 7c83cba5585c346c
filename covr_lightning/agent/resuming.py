"""What a checkpoint holds of an agent beside its weights and optimizers, and how the agent goes on from one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from covr_lightning import processes
from covr_lightning.agent.acting import Acting
from covr_lightning.agent.checks import NETWORKS, check_checkpoint
from covr_lightning.agent.finite import FiniteGuard
from covr_lightning.random_state import new_generator, seed_of

#: Settings of an optimizer that a resumed run takes from its config.
_RATES = ("lr", "betas", "weight_decay")


class Resuming(Acting):
    """An agent that goes on as if it had not been stopped. The networks are those of its subclass SACModule."""

    finite: FiniteGuard

    def __init__(self) -> None:
        super().__init__()
        self._generator: torch.Generator | None = None
        self._generator_state: Tensor | None = None
        self._rates: list[list[dict[str, Any]]] = []

    @property
    def generator(self) -> torch.Generator:
        """The source of this process's augmentation and update noise, on the module's device."""
        if self._generator is None or self._generator.device != self.device:
            self._generator = new_generator(self.device, seed_of(self.seed, processes.number()), self._generator_state)
            self._generator_state = None
        return self._generator

    def on_fit_start(self) -> None:
        """Note the optimizers' settings before a checkpoint brings others."""
        self._rates = [
            [{name: group[name] for name in _RATES if name in group} for group in optimizer.param_groups]
            for optimizer in self.trainer.optimizers
        ]

    def on_train_start(self) -> None:
        """Go on with the settings of this run's config, also where a checkpoint came with others."""
        if self.trainer.lr_scheduler_configs:
            return
        for optimizer, settings in zip(self.trainer.optimizers, self._rates, strict=True):
            for group, own in zip(optimizer.param_groups, settings, strict=True):
                group.update(own)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the environment and the networks are, and the processes' generators, to the checkpoint."""
        self.finite.settle()
        checkpoint["covr_spec"], checkpoint["covr_networks"] = self.spec.as_dict(), NETWORKS
        checkpoint["covr_architecture"] = self.architecture
        checkpoint["covr_skipped"] = processes.gather_on_first(self.finite.skipped)
        checkpoint["covr_generators"] = processes.gather_on_first(self.generator.get_state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another task or version before anything is overwritten."""
        check_checkpoint(checkpoint, self)
        generators, number = checkpoint["covr_generators"], processes.number()
        skipped = checkpoint.get("covr_skipped", [])  # not in those of before 28 November 2026
        if len(skipped) == processes.count():
            self.finite.skipped = skipped[number]
        elif not number:
            self.finite.skipped = sum(skipped)
        self._generator, self._generator_state = None, generators[number] if number < len(generators) else None
        self._start_a_new_epoch(checkpoint)

    def _start_a_new_epoch(self, checkpoint: dict[str, Any]) -> None:
        """Take only Lightning's count of optimizer steps from a checkpoint, not its place within an epoch.

        A resumed run is an epoch of the agent steps that are left: what is done is known to the run's own clock, and
        a run that had come to its end can be given more steps.
        """
        loops = checkpoint.get("loops", {})
        if self._trainer is None or "fit_loop" not in loops:
            return
        fresh = self._trainer.fit_loop.state_dict()
        steps = "epoch_loop.manual_optimization.optim_step_progress"
        fresh[steps] = loops["fit_loop"][steps]
        loops["fit_loop"] = fresh
