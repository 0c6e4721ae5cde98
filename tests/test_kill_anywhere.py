"""A few of the kills of kill_anywhere.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked")
def test_a_run_killed_anywhere_resumes_bit_for_bit():
    script = Path(__file__).parent / "kill_anywhere.py"
    command = [sys.executable, str(script), "--kills", "6", "--steps", "18", "--seed", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if os.access("/dev/shm", os.W_OK):  # a kill asks nothing of the disk, and hundreds of fsyncs take minutes
        environment["TMPDIR"] = "/dev/shm"
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert answer.returncode == 0, answer.stderr
    assert "6 kills" in answer.stdout and "bit-equal" in answer.stdout
