"""Starting the training processes of one machine, each with its share of the cores.

For several machines use torchrun; the training processes read the same environment variables.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

LAUNCHER_VARIABLE = "VISIONLLM_TRAIN_LAUNCHER"  # process id of the launcher, for its training processes
INTERRUPTED = 130  # exit code of a run that was interrupted and saved


def launched() -> bool:
    """Whether this process is one of several started by :func:`launch` or torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launcher_lost() -> bool:
    """Whether the launcher that started this process is gone (killed): nobody waits for it any more."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    return launcher is not None and os.getppid() != int(launcher)


def end(code: int) -> NoReturn:
    """End this training process with an exit code; one of several without tearing the interpreter down.

    The threads of the collectives may still let go of tensors, which takes the interpreter's lock: during the
    interpreter's teardown that aborts the process, although everything is saved.
    """
    if launched():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def launch(processes: int, command: Sequence[str]) -> int:
    """Run the command in this many processes and wait; returns the exit code.

    SIGINT and SIGTERM are passed on once (the processes save and end); a second SIGINT kills. When one
    process fails the others are ended.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        LAUNCHER_VARIABLE: str(os.getpid()),
    }
    children = [
        subprocess.Popen(
            list(command),
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        again = received.count(signal.SIGINT) > 1
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = _wait(children)
        # A process that was not ready for signals yet ends by them, with nothing to save.
        return INTERRUPTED if received and code == 128 + signal.SIGTERM else code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for child in children:
            if child.poll() is None:
                child.kill()


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [code for child in children if (code := child.poll()) is not None]
        failed = [code for code in codes if code not in (0, INTERRUPTED)]
        if failed:
            _end(children)
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if len(codes) == len(children):
            return max(codes)
        time.sleep(0.2)


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    # A process whose peer has failed cannot finish its collective: no use in asking it to save.
    time.sleep(1.0)  # let it report its own error first
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
