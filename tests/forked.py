"""Processes that begin at once, because they are forked from one that has imported what they need.

Starting Python and importing PyTorch and Lightning takes several seconds of a core, for most tests longer than what
the process is there for. What hangs on how a process starts, and on how Python ends in it, which these leave out, has
tests that start it as a user does.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "covr_lightning.training", "covr_lightning.finetune.module", "peft", "torch.utils.tensorboard",
        "transformers.models.idefics3.modeling_idefics3",
    ]
)  # fmt: skip
_started: list[BaseProcess] = []


def start(
    module: str, arguments: Sequence[str], said: Path, environment: Mapping[str, str] = os.environ
) -> BaseProcess:
    """Start ``python -m MODULE ARGUMENTS``.

    Args:
        module: Its name.
        arguments: Its command line.
        said: The file that both its outputs go to.
        environment: Its environment variables.
    """
    process = _FORKS.Process(target=_become, args=(module, list(arguments), dict(environment), str(said)))
    process.start()
    _started.append(process)
    return process


def end_all() -> None:
    """Kill what has been started and not ended, as after a test that failed."""
    while _started:
        process = _started.pop()
        process.kill()
        process.join()


def launch(
    module: str, arguments: Sequence[Sequence[str]], folder: Path, seconds: float = 400
) -> tuple[list[int], str]:
    """Have ``python -m MODULE ARGUMENTS`` run in processes as torchrun starts them, a thread each.

    Args:
        module: Its name.
        arguments: Of each process.
        folder: Where ``process_N.txt`` are written, what each says.
        seconds: How long each may take; what has not ended then is killed.

    Returns:
        Their exit statuses (−n: ended by signal n), and what they said.
    """
    port, count, started = str(_free_port()), len(arguments), []
    said = [folder / f"process_{rank}.txt" for rank in range(count)]
    for rank, own in enumerate(arguments):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1",
            "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(count),
        }  # fmt: skip
        started.append(start(module, own, said[rank], environment))
    for process in started:
        process.join(seconds)
    end_all()
    return [process.exitcode or 0 for process in started], "\n".join(path.read_text() for path in said)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _become(module: str, arguments: list[str], environment: dict[str, str], said: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv[:] = [module, *arguments]
    if "OMP_NUM_THREADS" in environment:  # which has been read already
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
