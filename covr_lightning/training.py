"""From a YAML to a run: LightningCLI with this package's keys, links and defaults."""

from __future__ import annotations

import logging
import signal
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning as L
import transformers
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import SingleDeviceStrategy

from covr_lightning import processes
from covr_lightning.agent.sac import SACModule
from covr_lightning.agent_ddp import AgentDDP, RunLauncher
from covr_lightning.callbacks import (
    CovrProgressBar,
    EvaluateEvery,
    EvaluationVideo,
    ProgressiveFineTune,
    RunCheckpoint,
    RunProfile,
    RunSummary,
    StopOnSignal,
    VLMActs,
)
from covr_lightning.callbacks.checkpoints import SaveError, is_all_saved
from covr_lightning.cli import run_folder
from covr_lightning.data.datamodule import ExperienceData
from covr_lightning.errors import ConfigError, RunFailed
from covr_lightning.finetune.module import VLMFineTuner
from covr_lightning.finetune.saved_rows import SavedRows
from covr_lightning.run_config import SaveConfig, write_config
from covr_lightning.run_log import RunCSVLogger, RunTensorBoardLogger
from covr_lightning.saving.checkpoints import CheckpointFiles
from covr_lightning.saving.lock import only_run_in
from covr_lightning.saving.round_files import RoundFiles, round_of
from covr_lightning.stopping import RunStopped, is_ctrl_c, stop_signals
from covr_lightning.sweep.differences import read_configuration
from covr_lightning.sweep.runs import env_steps_of
from covr_lightning.trainer_keys import refuse_trainer_keys, trainer_errors
from covr_lightning.vlm.vlm import VLM
from covr_lightning.yaml_errors import check_nulls, one_sentence

CLI = TypeVar("CLI", bound="ParsingCLI")


#: Keys of the Trainer's that a run has others for: what each is when it is not given, and what to say if it is.
_THE_RUNS_OWN = {
    "max_epochs": (None, ", which says nothing to a run; set data.max_env_steps instead"),
    "max_steps": (-1, ", which says nothing to a run; set data.max_env_steps instead"),
    "check_val_every_n_epoch": (1, ", which says nothing to a run; set data.eval_every_env_steps instead"),
    "val_check_interval": (1.0, ", which says nothing to a run; set data.eval_every_env_steps instead"),
    "limit_train_batches": (1.0, ", which would end a run unsaved; set data.max_env_steps instead"),
    "limit_val_batches": (1.0, ", without which a run is not saved; set data.eval_episodes instead"),
    "overfit_batches": (0.0, ", which says nothing to a run; it must be left out"),
    "default_root_dir": (None, ", which says nothing to a run; set runs_dir and name instead"),
}

#: Keys of ``data`` and ``vlm`` that what the VLM does alone depends on, beside its adapter.
_OF_THE_VLM_ALONE = (
    "env", "seed", "label_every_agent_steps",
    "path", "prompt", "dtype", "decoding", "image_position", "quantization", "frames",
)  # fmt: skip


def _said(error: Exception) -> Exception:
    """What model, data or a part of theirs has said behind the parser's error, which holds the whole configuration."""
    while not isinstance(error, ConfigError | ModuleNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


class ParsingCLI(LightningCLI):
    """LightningCLI that says in one sentence what is wrong with a config, and knows a run's folder."""

    def add_run_arguments(self, parser: LightningArgumentParser) -> None:
        """Add the keys that say where a run is written and what its config builds on."""
        parser.add_argument("--runs_dir", type=str, default="runs", help="folder of all runs")
        parser.add_argument("--name", type=str | None, default=None, help="the run's name; by default the config's")
        parser.add_argument("--base", type=str | list[str] | None, default=None, help="configs that a YAML builds on")

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that raises what it finds wrong, instead of printing its usage and leaving."""
        return super().init_parser(exit_on_error=False, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line and its configs.

        Raises:
            ConfigError: A key or a value is wrong.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise ConfigError(one_sentence(str(error), self._parser(args[0]))) from error

    def before_instantiate_classes(self) -> None:
        """Refuse null where it is none, and note what a class raises: the parser's error may leave that out."""
        check_nulls(self.config[self.subcommand])
        self._raised: Exception | None = None

        def noting(class_type: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            try:
                built = class_type(*args, **kwargs)
            except Exception as error:
                self._raised = error
                raise
            self._raised = None  # what was raised before is made good
            return built

        self.parser.add_instantiator(noting, object, subclasses=True)

    def instantiate_classes(self) -> None:
        """Build everything.

        Raises:
            ConfigError: A package that a class needs is not installed.
            Exception: What a class has raised.
        """
        try:
            super().instantiate_classes()
            return
        except ConfigError:
            raise
        except Exception as error:
            raised = self._raised or _said(error)
        if isinstance(raised, ModuleNotFoundError):  # else a class has said itself what is missing
            said = " ".join(str(raised).split())
            raise ConfigError(f"The config names a class whose package is not there: {said}") from raised
        raise raised

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed < 2**32:
            raise ConfigError(f"seed_everything is {seed}; it must lie in 0 to {2**32 - 1}.")
        super()._set_seed()

    def save_config(self, path: Path) -> None:
        """Write the run's full configuration."""
        write_config(self._parser(self.subcommand), self.config[self.subcommand], path)


class CovrCLI(ParsingCLI):
    """LightningCLI with a `vlm` key, a run folder, and what every run wants."""

    run_name = "run"
    command: str | None = None  # if it is another than the subcommand

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys beside `model`, `data` and `trainer`, and fill in what one part knows of another."""
        parser.add_class_arguments(VLM, "vlm")
        self.add_run_arguments(parser)
        parser.add_argument("--video", type=bool, default=False, help="write an mp4 of each evaluation's first episode")
        parser.add_argument("--profile", type=bool, default=False, help="print where the time of a fit went")
        parser.add_argument(
            "--actor", type=Literal["policy", "vlm"], default="policy", help="who acts in validate and test"
        )
        parser.link_arguments("vlm", "data.init_args.vlm", apply_on="instantiate")
        parser.link_arguments("data.spec", "model.init_args.spec", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Give the Trainer the run's folder, loggers, checkpoints and callbacks, unless the YAML has its own."""
        config = self._get(self.config, "trainer")
        refuse_trainer_keys(config, _THE_RUNS_OWN)
        ckpt_path, fitting = self.config[self.subcommand].get("ckpt_path"), self.subcommand == "fit"
        if not fitting and ckpt_path is None and self._get(self.config, "actor") == "policy":
            alone = "" if self.command == "export" else ", or --actor vlm, for the VLM alone"
            raise ConfigError(
                f"`covr {self.command or self.subcommand}` needs --ckpt_path, e.g. --ckpt_path "
                f"runs/NAME/checkpoints/best.ckpt{alone}."
            )
        name = self._get(self.config, "name")
        folder = run_folder(
            Path(self._get(self.config, "runs_dir")),
            name or self.run_name,
            ckpt_path,
            anew=fitting and name is not None,
        )
        if ckpt_path == "last":
            self.config_init[self.subcommand]["ckpt_path"] = str(folder / "checkpoints" / "last.ckpt")
        elif ckpt_path is not None and not Path(ckpt_path).is_file():
            inside = Path(ckpt_path) / "checkpoints" / "last.ckpt"
            hint = f" (did you mean {inside}?)" if inside.is_file() else ""
            raise ConfigError(f"--ckpt_path {ckpt_path}: there is no such file{hint}.")
        kwargs["default_root_dir"] = str(folder)
        kwargs["max_epochs"] = 1  # the run's length is data.max_env_steps
        kwargs["max_steps"] = -1
        kwargs["num_sanity_val_steps"] = 0
        kwargs["check_val_every_n_epoch"] = 1
        kwargs["logger"] = self._loggers(folder) if fitting else False
        trainer_callbacks = _as_list(self._get(self.config_init, "trainer").get("callbacks"))
        if sum(isinstance(callback, ProgressiveFineTune) for callback in trainer_callbacks) > 1:
            raise ConfigError(
                "trainer.callbacks has more than one ProgressiveFineTune; a run has one, and keys below "
                "trainer.callbacks, without the + that adds another, change it."
            )
        if fitting:
            trainer_callbacks += [EvaluateEvery(), RunSummary(), StopOnSignal()]
            if not _has(trainer_callbacks, RunProfile):
                trainer_callbacks.append(RunProfile(show=bool(self._get(self.config, "profile"))))
            if config.enable_checkpointing is not False and not _has(trainer_callbacks, ModelCheckpoint):
                trainer_callbacks.append(RunCheckpoint())
        plugins = _as_list(self._get(self.config_init, "trainer").get("plugins"))
        if not _has(plugins, CheckpointIO):
            kwargs["plugins"] = [*plugins, CheckpointFiles()]
        if config.enable_progress_bar is not False and fitting and not _has(trainer_callbacks, CovrProgressBar):
            trainer_callbacks.append(CovrProgressBar())
        if self._get(self.config, "actor") == "vlm":
            if fitting:
                raise ConfigError("--actor is 'vlm', which is for validate and test; in fit it can be 'policy'.")
            trainer_callbacks.append(VLMActs(self._vlm_file(folder)))
        if self._get(self.config, "video"):
            trainer_callbacks.append(EvaluationVideo())
        kwargs["use_distributed_sampler"] = False  # the data share themselves out
        with trainer_errors():
            trainer = super().instantiate_trainer(**kwargs, callbacks=list(trainer_callbacks))
        if fitting and not isinstance(trainer.strategy, SingleDeviceStrategy):  # ddp can be of one process
            strategy = AgentDDP.like(trainer.strategy)
            with trainer_errors():
                trainer = super().instantiate_trainer(**kwargs, callbacks=trainer_callbacks, strategy=strategy)
            if trainer.global_rank:
                logging.getLogger("covr_lightning").setLevel(logging.WARNING)
        return trainer

    def _vlm_file(self, folder: Path) -> Path | None:
        """Where ``covr report`` looks for what this VLM does alone: in the run whose round its adapter is of.

        Without an adapter it is round 0 of the run of this folder. None if that run has another VLM or would have had
        it play otherwise, or there is no such run, or the adapter is none that it goes by now.
        """
        vlm, data = self._get(self.config, "vlm"), self._get(self.config, "data").init_args
        if vlm.adapter is None:
            files = RoundFiles(folder / "rounds", 0)
        else:
            adapter = Path(vlm.adapter).resolve()
            files = RoundFiles(adapter.parent, round_of(adapter) or 0)
            if adapter != files.adapter:
                return None
        run = read_configuration(files.rounds.parent / "config.yaml")
        of_run = {**(run.get("data") or {}).get("init_args", {}), **(run.get("vlm") or {})}
        here = {**vlm.as_dict(), **data.as_dict()}
        known = [key for key in _OF_THE_VLM_ALONE if key in of_run]  # an older run lacks keys that came later
        return files.episodes if "env" in known and all(of_run[key] == here[key] for key in known) else None

    def _loggers(self, folder: Path) -> list[Logger] | Literal[False]:
        """A run's CSV, and TensorBoard or what the YAML has instead of it; nothing with ``logger: false``."""
        given = self._get(self.config_init, "trainer").get("logger")
        if given is False:
            return False
        csv = RunCSVLogger(folder, name="logs", version="csv")
        if given in (None, True):
            return [csv, RunTensorBoardLogger(folder, name="logs", version="tensorboard")]
        given = _as_list(given)
        return given if _has(given, CSVLogger) else [csv, *given]

    def _parse_ckpt_path(self) -> None:
        """Lightning's would read hyperparameters from the checkpoint, which has none, before it is checked."""

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "fit" and self._is_over():
            return
        if subcommand != "fit":
            super()._run_subcommand(subcommand)
            return
        launcher = self.trainer.strategy.launcher
        if isinstance(launcher, RunLauncher):  # it waits for the others before any callback listens
            stop_signals.install()
            stop_signals.begin_at_once()
        with only_run_in(Path(self.trainer.default_root_dir)):
            try:
                with processes.waits_of_others_end_in_one_sentence():
                    super()._run_subcommand(subcommand)
                if not is_all_saved(self.trainer):
                    steps = self.datamodule.counters.env_steps
                    raise SaveError(f"The end of the run, at {steps} environment steps, could not be saved")
            except (RunFailed, RunStopped) as ended:
                ended.has_checkpoint = self._has_checkpoint()
                raise
            except (KeyboardInterrupt, SystemExit) as left:  # a second Ctrl-C
                if not is_ctrl_c(left):
                    raise
                stopped = RunStopped(signal.SIGINT)
                stopped.has_checkpoint = self._has_checkpoint()
                raise stopped from left
            finally:
                if isinstance(launcher, RunLauncher):
                    launcher.end()
                    stop_signals.uninstall()

    def _has_checkpoint(self) -> bool:
        folder = Path(self.trainer.default_root_dir)  # the data have made it that of the first process
        return (folder / "checkpoints" / "last.ckpt").is_file()

    def _is_over(self) -> bool:
        """Whether a run is to go on that has all its steps, and say so."""
        folder = Path(self.trainer.default_root_dir)
        given = self._get(self.config_init, "ckpt_path")
        if given is None or Path(given).absolute() != (folder / "checkpoints" / "last.ckpt").absolute():
            return False
        steps, length = env_steps_of(folder / "summary.json", self.datamodule.spec.task), self.datamodule.max_env_steps
        if steps >= length:
            print(f"covr: {folder} is finished: it has {steps:.0f} of {length} environment steps (data.max_env_steps).")
        return steps >= length


def _as_list(given: Any) -> list[Any]:
    """What the Trainer takes one of or several, as several."""
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


def _has(callbacks: list[Any], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def run(arguments: list[str], name: str) -> int:
    """Run ``fit``, ``validate`` or ``test``.

    Args:
        arguments: Command line with configs resolved.
        name: The run's default name.

    Returns:
        Exit status.
    """
    from covr_lightning.finetune.cli import FineTuneCLI, fine_tunes_alone  # it builds on ParsingCLI

    if fine_tunes_alone(arguments):
        FineTuneCLI.run_name = name
        return build(FineTuneCLI, arguments, VLMFineTuner, SavedRows).status
    CovrCLI.run_name = name
    build(CovrCLI, arguments)
    return 0


def build(
    cli: type[CLI],
    arguments: list[str],
    model: type[L.LightningModule] = SACModule,
    data: type[L.LightningDataModule] = ExperienceData,
) -> CLI:
    """Parse a command line, build what it names, and do what the kind of CLI does with it.

    Args:
        cli: The kind.
        arguments: Command line with configs resolved.
        model: What ``model`` must be a subclass of.
        data: What ``data`` must be a subclass of.
    """
    _silence()
    return cli(
        model,
        data,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"log_every_n_steps": 50, "enable_model_summary": False},
        auto_configure_optimizers=False,
        args=arguments,
    )


def _says_something(record: logging.LogRecord) -> bool:
    """Not a tip, and not that a run's one epoch is over."""
    return not any(said in record.getMessage() for said in ("Tip:", "`max_epochs=1` reached"))


def _silence() -> None:
    """Leave out what libraries say about themselves and no user can act on."""
    for name in ("absl", "bitsandbytes", "torch.onnx._internal.exporter._registration"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_says_something)
    transformers.utils.logging.disable_progress_bar()
    for pattern in (
        ".*does not have many workers.*",
        ".*args parameter is intended to run from within Python.*",
        ".*LeafSpec.*",
        ".*torch.jit.*",
        ".*is an experimental.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*GPU available but not used.*",
        ".*`IterableDataset` has `__len__` defined.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*is_gradient_checkpointing.*",
        ".*but have no logger configured.*",  # an evaluation prints its figures
        ".*No complete tensor found in the group.*",
        ".*on epoch level in distributed setting.*",  # an evaluation is of all processes already
    ):
        warnings.filterwarnings("ignore", message=pattern)
