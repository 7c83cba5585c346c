"""Runs a command that ends with the process that asked for it, however that ends; a script, run by its path.

    python -I supervisor.py PIPE COMMAND ARGUMENT...

PIPE is the number of the reading end of a pipe whose other end the asking process holds and never writes to: it closes
when that process is gone, kill -9 included. A process that is told to stop (SIGTERM) stops the command.
"""

import os
import signal
import subprocess
import sys
import threading
from types import FrameType

#: How long a command may take to end once it is told to; torchrun gives its workers, in sessions of their own, 30.
SECONDS_TO_STOP = 40


def main(pipe: int, command: list[str]) -> int:
    """Run the command; this process leads the group that it is in, and ends as the command does."""
    try:
        process = subprocess.Popen(command, close_fds=True)
    except OSError as error:
        print(f"{command[0]} cannot be started ({error.strerror})", flush=True)
        return 127

    alone = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        threading.Thread(target=_end, args=(process,), daemon=True).start()

    def watch() -> None:
        os.read(pipe, 1)  # which nobody writes: it returns at the pipe's end
        alone.set()
        _end(process)

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=watch, daemon=True).start()
    status = process.wait()
    if alone.is_set():
        os.killpg(0, signal.SIGKILL)  # with all that the command has left
    if status < 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the command: first asked to, for torchrun ends its workers then."""
    process.terminate()
    try:
        process.wait(timeout=SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
