"""The `covr` command."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import glob
import logging
import os
import re
import signal
import sys
import threading
import traceback
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from covr_lightning.allocator import keep_freed_memory
from covr_lightning.config_files import resolve_arguments
from covr_lightning.errors import ConfigError, RunFailed
from covr_lightning.imports import prepare_imports
from covr_lightning.secrets import MaskSecrets, masked
from covr_lightning.stopping import RunStopped, is_ctrl_c

USAGE = """usage: covr COMMAND ...

  covr fit --config NAME.yaml [--KEY VALUE ...]      train
  covr validate|test --config NAME.yaml --ckpt_path FILE
                                                     evaluate a checkpoint
  covr export --config NAME.yaml --ckpt_path FILE --out FOLDER
                                                     write the policy as torch.export and ONNX
  covr benchmark inference [--vlm.path FOLDER] [--policy FOLDER]
                                                     memory and time an image
  covr sweep FOLDER [--seeds 1 2 3] [-- --KEY VALUE ...]
                                                     train every config of a folder with every seed; a table
  covr report RUN... [--out FOLDER]                  a page that shows what runs did
  covr doctor                                        what is there, what is missing
  covr configs                                       the shipped configs
  covr train-embedded-vlm --out FOLDER               train the embedded VLM by its recipe

Keys: `covr fit --help` lists the trainer's and the run's, `covr fit --config NAME.yaml --data.help` (or --model.help) a
config's, `--model.prior.help DelayedPrior` a class's; with --print_config a command shows all of them with their values
and runs nothing."""


EXPORT_USAGE = """usage: covr export --config NAME.yaml --ckpt_path FILE --out FOLDER [--KEY VALUE ...]

Writes FOLDER/policy.pt2 (torch.export) and FOLDER/policy.onnx. Config and keys are those that the checkpoint was
trained with."""

#: How OpenMP's threads wait, where the user has not said it.
WAIT_POLICY = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}


def main(argv: list[str] | None = None) -> int:
    """Run a command; errors that a user can mend are one sentence and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # OpenMP's threads spin while they wait. On a busy machine the one that is waited for then gets no core: beside one
    # other job, an update on two cores took 1103 ms spinning and 122 ms sleeping. So they soon sleep: how soon is for
    # GNU's library, which waking costs 3 % of an update otherwise. Read once, when PyTorch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.update(WAIT_POLICY | os.environ)
    if argv is None:  # the process is this command's own
        keep_freed_memory()
        sys.path.append(os.getcwd())  # classes of one's own, named in a YAML; `python -m` has it in the first place
        sys.excepthook, threading.excepthook = _print_masked, _of_thread
    _log_to_stderr()
    _show_crashes()
    try:
        return _dispatch(arguments)
    except RunStopped as stopped:
        name = signal.Signals(stopped.signum).name
        how = "; to go on, run the same command with --ckpt_path last" * stopped.has_checkpoint
        print(f"covr: stopped by {name}{how}.", file=sys.stderr)
        return stopped.exit_status
    except RunFailed as error:
        saved = " What was saved before stays; --ckpt_path last goes on from there." * error.has_checkpoint
        print(f"covr: {masked(str(error))}.{saved}", file=sys.stderr)
        return 3
    except (KeyboardInterrupt, SystemExit) as left:
        if not is_ctrl_c(left):
            raise
        print("covr: stopped by SIGINT.", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # as in `covr configs | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        cause = _config_error(error)
        if cause is None:
            raise
        print(f"covr: {masked(str(cause))}", file=sys.stderr)
        return 2


def _config_error(error: BaseException | None) -> ConfigError | None:
    """The ConfigError behind an error: the argument parser wraps what a class raises when it is built."""
    while error is not None and not isinstance(error, ConfigError):
        if type(error).__name__ == "MisconfigurationException":  # Lightning's, of a Trainer's settings
            return ConfigError(f"trainer: {' '.join(str(error).split())}")
        if isinstance(error, PermissionError) and error.filename is not None:
            return ConfigError(f"{error.filename}: {error.strerror}.")
        error = error.__cause__
    return error


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        from covr_lightning import __version__

        print(__version__)
        return 0
    own: dict[str, Callable[[list[str]], int]] = {
        "doctor": _doctor,
        "configs": _configs,
        "train-embedded-vlm": _train_embedded_vlm,
        "export": _export,
        "sweep": _sweep,
        "benchmark": _benchmark,
        "report": _report,
    }
    if command in ("doctor", "configs"):
        if {"-h", "--help"} & set(arguments):
            print(USAGE)
            return 0
        if len(arguments) > 1:
            raise ConfigError(f"`covr {command}` takes no arguments, but {' '.join(arguments[1:])} is given.")
    if command in own:
        return own[command](arguments[1:])
    if command not in ("fit", "validate", "test"):
        raise ConfigError(f"Unknown command {command!r}; it can be fit, validate, test, {', '.join(own)}.")
    resolved, stems = resolve_arguments(arguments)
    if not stems and not {"-h", "--help"} & set(arguments):
        raise ConfigError(f"`covr {command}` needs --config, e.g. `covr {command} --config quickstart.yaml`.")
    prepare_imports()
    from covr_lightning.training import run

    return run(resolved, "+".join(stems))


def _doctor(arguments: list[str]) -> int:
    from covr_lightning.doctor import doctor

    return doctor()


def _configs(arguments: list[str]) -> int:
    from covr_lightning.config_files import bundled_configs

    for name, path in bundled_configs().items():
        title = next((line for line in path.read_text().splitlines() if line.startswith("# ")), "# ")
        print(f"{name:<36} {title[2:]}")
    sys.stdout.flush()
    return 0


def _export(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(EXPORT_USAGE)
        return 0
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", default="", nargs="?")
    given, rest = parser.parse_known_args(arguments)
    folder = given.out
    if not folder:
        raise ConfigError("`covr export` needs --out, the folder to write policy.pt2 and policy.onnx to.")
    resolved, stems = resolve_arguments(["test", *rest])
    if not stems:
        raise ConfigError("`covr export` needs --config, the config that the checkpoint was trained with.")
    prepare_imports()
    from covr_lightning.opening import export

    return export(resolved, "+".join(stems), Path(folder))


def _sweep(arguments: list[str]) -> int:
    prepare_imports()
    from covr_lightning.sweep.command import sweep

    return sweep(arguments)


def _report(arguments: list[str]) -> int:
    from covr_lightning.report.command import report

    return report(arguments)


def _benchmark(arguments: list[str]) -> int:
    prepare_imports()
    from covr_lightning.benchmark import benchmark

    return benchmark(arguments)


def _train_embedded_vlm(arguments: list[str]) -> int:
    prepare_imports()
    from jsonargparse import ArgumentParser

    from covr_lightning.vlm.embedded.recipe import train_embedded_vlm
    from covr_lightning.yaml_errors import one_sentence

    parser = ArgumentParser(
        prog="covr train-embedded-vlm", description="Train the embedded VLM by its recipe.", exit_on_error=False
    )
    parser.add_argument("--out", type=Path | None, help="folder to write; one written before is replaced")
    parser.add_argument("--seed", type=int, default=0)
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ConfigError(f"`covr train-embedded-vlm`: {one_sentence(str(error), parser)}") from error
    if parsed.out is None:
        raise ConfigError("`covr train-embedded-vlm` needs --out, the folder to write the VLM to.")
    train_embedded_vlm(parsed.out, seed=parsed.seed)
    return 0


def check_name(root: Path, name: str) -> None:
    """Check the name of a run or a sweep.

    Raises:
        ConfigError: It is none of a folder in `root`, the folder of all runs.
    """
    if Path(name).name != name:
        raise ConfigError(f"--name is {name!r}; it must be the name of one folder in {root} (--runs_dir).")


def run_folder(root: Path, name: str, ckpt_path: str | None, anew: bool = False) -> Path:
    """The folder of a run: ``root/name``, or the first free ``root/name-N``.

    Args:
        root: Folder of all runs.
        name: The run's name.
        ckpt_path: With ``"last"``, the newest existing folder of these that has a last checkpoint is meant, but none
            whose run was given that very name; with a checkpoint inside a run's folder, that folder.
        anew: A checkpoint inside a run's folder of another name begins a new run.

    Raises:
        ConfigError: ``"last"`` is asked for and there is none, or the name is none of a folder.
    """
    check_name(root, name)
    is_its_name = re.compile(re.escape(name) + r"(-\d+)?").fullmatch
    if ckpt_path == "last":
        like = root.glob(f"{glob.escape(name)}*")
        mine = [p for p in like if p.name == name or (is_its_name(p.name) and not _named_so(p))]
        saved = [p for p in mine if (p / "checkpoints" / "last.ckpt").exists()]
        if not saved:
            raise ConfigError(f"--ckpt_path last: no run {root / name} has a last checkpoint yet.")
        return max(saved, key=lambda p: (p / "checkpoints" / "last.ckpt").stat().st_mtime)
    if ckpt_path is not None and Path(ckpt_path).absolute().parent.name == "checkpoints":
        of_run = Path(ckpt_path).absolute().parent.parent
        if not anew or is_its_name(of_run.resolve().name):
            return of_run
    folder, n = root / name, 2
    while folder.exists():
        folder, n = root / f"{name}-{n}", n + 1
    return folder


def _named_so(folder: Path) -> bool:
    """Whether a run was given its folder's name, number and all, by ``--name``."""
    from covr_lightning.sweep.differences import read_configuration

    return read_configuration(folder / "config.yaml").get("name") == folder.name


class _ToStderr(logging.StreamHandler):
    """Writes to what standard error is at the time, which a caller of :func:`main` may change."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        """It cannot be set."""


def _log_to_stderr() -> None:
    """Show this package's own messages; other libraries keep their own handlers."""
    logger = logging.getLogger("covr_lightning")
    if not logger.handlers:
        handler = _ToStderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(MaskSecrets())
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _print_masked(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print what nobody caught."""
    print(masked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _of_thread(raised: threading.ExceptHookArgs) -> None:
    """The same where it ended a thread; TensorBoard's writer on a full disk hands it on to who logs, who warns."""
    if raised.exc_value is not None and getattr(raised.thread, "exception", None) is not raised.exc_value:
        _print_masked(raised.exc_type, raised.exc_value, raised.exc_traceback)


def _show_crashes() -> None:
    """Have a crash in a native library (CARLA's client, a driver) say where Python was."""
    if not faulthandler.is_enabled():
        with contextlib.suppress(AttributeError, RuntimeError, ValueError):  # a standard error that is no file
            faulthandler.enable()


if __name__ == "__main__":
    sys.exit(main())
