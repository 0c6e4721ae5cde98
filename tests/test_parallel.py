"""The CPU kernels' threads: no more than asked for, asleep between calls, there after fork, shared.

Each test has a process of its own, so that no other library's threads are counted.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SETUP = """
import os, sys, threading, time
import numpy as np
from visionllm import arrays

random = np.random.default_rng(0)
inputs = (
    random.standard_normal((2, 12, 4, 16), np.float32),
    np.array([[3, 4]]),
    np.array([0]),
    random.random((2, 7000, 4, 1, 4, 2), np.float32),
    random.random((2, 7000, 4, 1, 4), np.float32),
)

def call(threads):
    return arrays.ms_deform_attn(*inputs, threads=threads)

expected = call(1)
"""


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", SETUP + code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


@needs_proc
def test_starts_no_more_threads_than_asked_for_and_keeps_them() -> None:
    run(
        """
def threads():
    return len(os.listdir("/proc/self/task"))

before = threads()
for count, helpers in ((1, 0), (2, 1), (1, 1), (3, 2), (2, 2), (3, 2)):
    for _ in range(5):
        assert np.array_equal(call(count), expected)
    assert threads() == before + helpers, f"{threads() - before} threads more after calls on {count}"
"""
    )


def test_sleeps_between_calls() -> None:
    run(
        """
call(3)
before = time.process_time()
time.sleep(0.5)
spent = time.process_time() - before
assert spent < 0.1, f"{spent} s of work in 0.5 s of rest"
"""
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own() -> None:
    run(
        """
call(3)
child = os.fork()
if child == 0:
    os._exit(0 if all(np.array_equal(call(3), expected) for _ in range(3)) else 1)
deadline = time.time() + 60
while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.time() < deadline:
    time.sleep(0.01)
if done == (0, 0):
    os.kill(child, 9)
assert done == (child, 0), f"the child ended with {done}"
assert np.array_equal(call(3), expected)
"""
    )


def test_callers_on_several_threads_share_them() -> None:
    run(
        """
wrong = []

def work():
    for _ in range(20):
        if not np.array_equal(call(3), expected):
            wrong.append(1)

workers = [threading.Thread(target=work) for _ in range(4)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join(60)
    assert not worker.is_alive(), "a call does not end"
assert not wrong
"""
    )
