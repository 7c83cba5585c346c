"""``covr sweep``: a folder of configs, or several configs, each with several seeds."""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from covr_lightning.cli import check_name
from covr_lightning.config_files import bundled_configs, resolve, resolve_folder, yamls_in
from covr_lightning.errors import ConfigError
from covr_lightning.random_state import LARGEST_SEED
from covr_lightning.secrets import masked
from covr_lightning.sweep.configuration import configuration
from covr_lightning.sweep.differences import with_seed
from covr_lightning.sweep.processes import Outcome, Processes
from covr_lightning.sweep.runs import SweepRun
from covr_lightning.sweep.table import make_row, print_table, write_table

#: What a sweep sets for each run itself, and how it is set.
_OWN = {
    "--runs_dir": "--runs_dir", "--name": "--name", "--ckpt_path": "the sweep, by what is there",
    "--seed_everything": "--seeds", "--data.seed": "--seeds", "--model.seed": "--seeds",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            f"{message}; `covr sweep --help` lists the options (what every run is to get goes behind `--`)."
        )


def _parser() -> _Parser:
    parser = _Parser(
        prog="covr sweep",
        description="Train each config with each seed, one run after the other, and write a table of mean ± std. Run "
        "the same command again after a stop: finished runs are skipped, cut ones go on.",
        epilog="What follows `--` goes to every run behind its config, e.g. -- --config qlora.yaml --vlm.path FOLDER",
    )
    parser.add_argument(
        "configs", nargs="+", metavar="FOLDER|YAML", help="a folder of YAMLs, or YAMLs; shipped or yours"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds (default: 1 2 3)")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument("--name", help="the sweep's folder in it (default: the folder's name, or sweep)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and run nothing")
    return parser


def sweep(arguments: list[str]) -> int:
    """Run ``covr sweep``.

    Args:
        arguments: Command line behind ``sweep``.

    Returns:
        Exit status: 1 if a run failed, 128 + the signal's number if one stopped the sweep, otherwise 0.

    Raises:
        ConfigError: Arguments or a config are wrong, or a run's folder holds another configuration.
    """
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options, overrides = _parser().parse_args(arguments[:cut]), arguments[cut + 1 :]
    _check(options.seeds, options.jobs, overrides)
    configs, name = _members(options.configs)
    name = options.name or name
    check_name(options.runs_dir, name)
    folder = options.runs_dir / name
    runs = _plan(configs, options.seeds, folder, overrides)
    states = [run.state() for run in runs]  # before anything runs: another configuration, a wrong key
    if options.dry_run:
        for run, state in zip(runs, states, strict=True):
            print(f"# {run} is finished" if state == "finished" else masked(f"covr {shlex.join(run.arguments(state))}"))
        return 0
    processes = Processes(runs, options.jobs, lambda line: print(line, flush=True))
    processes.run()
    return _report(runs, processes, folder, f"covr sweep {masked(shlex.join(arguments))}")


def _check(seeds: Sequence[int], jobs: int, overrides: Sequence[str]) -> None:
    if jobs < 1:
        raise ConfigError(f"--jobs is {jobs}; it must be at least 1.")
    if len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) > LARGEST_SEED:
        raise ConfigError(
            f"--seeds is {' '.join(map(str, seeds))}; they must be different and between 0 and {LARGEST_SEED}."
        )
    for argument in overrides:
        flag = argument.split("=")[0].replace(".init_args", "")
        if flag in _OWN:
            raise ConfigError(f"{flag} behind `--` would give every run the same; it is set by {_OWN[flag]}.")


def _members(names: Sequence[str]) -> tuple[dict[str, str], str]:
    """The members' names with what ``--config`` takes for each, and the sweep's default name.

    Raises:
        ConfigError: A name leads nowhere, a folder is empty, or two members have one name.
    """
    paths: list[Path] = []
    folders: list[Path] = []
    for name in names:
        if name.endswith((".yaml", ".yml")):
            paths.append(resolve(name))
            continue
        folders.append(resolve_folder(name))
        inside = yamls_in(folders[-1])
        if not inside:
            raise ConfigError(f"The folder {name} has no *.yaml in it to sweep over.")
        paths += inside
    twice = [stem for stem, count in Counter(path.stem for path in paths).items() if count > 1]
    if twice:
        raise ConfigError(f"Two configs of the sweep are named {twice[0]}, and so would be their runs; rename one.")
    single = len(names) == len(folders) == 1
    shipped = {path: name for name, path in bundled_configs().items()}
    return {path.stem: shipped.get(path, str(path)) for path in paths}, folders[0].resolve().name if single else "sweep"


def _plan(configs: dict[str, str], seeds: Sequence[int], folder: Path, overrides: Sequence[str]) -> list[SweepRun]:
    runs = []
    for name, config in configs.items():
        first = SweepRun(config, name, seeds[0], folder / name, overrides, {})
        parsed = configuration(first.arguments("new"))
        runs += [
            SweepRun(config, name, seed, folder / name, overrides, with_seed(parsed, seed)) for seed in seeds
        ]  # fmt: skip
    return runs


def _report(runs: Sequence[SweepRun], processes: Processes, folder: Path, command: str) -> int:
    """Print and write the table and what went wrong; returns the exit status."""
    ended: list[tuple[SweepRun, Outcome]] = list(zip(runs, processes.outcomes, strict=True))
    planned = Counter(run.name for run in runs)
    rows = []
    for name in planned:
        curves = {run.seed: run.curve() for run, o in ended if run.name == name and o.kind in ("finished", "skipped")}
        rows.append(make_row(name, curves, planned[name]))
    failed = [f"{run}: {outcome.why} ({run.log})" for run, outcome in ended if outcome.kind == "failed"]
    if any(row.seeds for row in rows):
        print_table(rows, folder.name)
        missing = [f"{run} failed: {o.why}" if o.why else f"{run} is not finished" for run, o in ended if not _done(o)]
        try:
            for path in write_table(rows, folder, command, missing):
                print(f"{path.name:>10}: {path}")
        except OSError as error:
            raise ConfigError(f"The table cannot be written to {folder} ({error.strerror}).") from error
    for line in failed:
        print(f"failed: {line}")
    if processes.stopped_by is not None:
        done = sum(_done(outcome) for _, outcome in ended)
        print(f"Stopped with {done} of {len(runs)} runs finished; run the same command again to go on.")
        return 128 + processes.stopped_by
    return 1 if failed else 0


def _done(outcome: Outcome) -> bool:
    return outcome.kind in ("finished", "skipped")
