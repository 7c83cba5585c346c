"""Configs built as `covr fit` builds them, without a run."""

from __future__ import annotations

from covr_lightning.agent import SACModule
from covr_lightning.config_files import resolve_arguments
from covr_lightning.data import ExperienceData
from covr_lightning.training import CovrCLI


def build(*arguments: str, kind: type[CovrCLI] = CovrCLI) -> CovrCLI:
    class Built(kind):  # type: ignore[valid-type, misc]
        def _run_subcommand(self, subcommand: str) -> None:
            """Build everything, train nothing."""

    resolved, _ = resolve_arguments(["fit", *arguments])
    return Built(
        SACModule, ExperienceData, subclass_mode_model=True, subclass_mode_data=True, auto_configure_optimizers=False,
        args=resolved,
    )  # fmt: skip
