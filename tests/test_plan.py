"""``visionllm plan``: its numbers against measured peaks, and what must hold between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from measured_step import CONFIGS, work_of

from visionllm.cli import plan as command
from visionllm.model.config import PRESETS
from visionllm.train.config import load_config, preset_names
from visionllm.train.plan import Plan, Workload, _weights, plan
from visionllm.train.plan import _Parameter as Parameter

WITHIN = 0.2  # of the measured peak: docs/scaling.md has the numbers


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks from Linux's /proc")
@pytest.mark.parametrize(("name", "checkpointing"), [("tiny", False), ("medium", False), ("medium", True)])
def test_estimates_are_near_measured_peaks(name, checkpointing):
    script = Path(__file__).with_name("measured_step.py")
    done = subprocess.run(
        [sys.executable, str(script), name, *(["checkpointing"] if checkpointing else [])],
        # Freed blocks go back to the system: what is measured is what lives.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)["peak"]
    config, pictures = CONFIGS[name]
    work = work_of(config, pictures)
    found = plan(config, work, checkpointing=checkpointing, autocast=False, cuda=False)
    print(f"{name}: {found.total / 1e6:.0f} MB planned, {measured / 1e6:.0f} MB measured")
    assert abs(found.total / measured - 1) <= WITHIN


def test_shares_and_sums():
    import torch

    kinds = [
        Parameter(1000, torch.bfloat16, False, "llm.layers.0"),
        Parameter(10, torch.float32, True, "llm.layers.0"),
        Parameter(600, torch.float32, True, None),
    ]
    alone, shared = (_weights(kinds, gpus, "fsdp", True) for gpus in (1, 2))
    assert alone.weights == {"frozen bfloat16": 2000, "trained float32": 2440}
    assert (alone.gradients, alone.optimizer, alone.average, alone.communication) == (2440, 4880, 2440, 0)
    assert shared.weights == {"frozen bfloat16": 1000, "trained float32": 1220}
    assert (shared.gradients, shared.optimizer) == (1220, 2440)
    assert shared.communication == 3 * 2040 + 2400 + 2 * 2400
    assert _weights(kinds, 2, "ddp", False).total == 2000 + 2440 + 2440 + 4880


def test_the_largest_batch():
    made = Plan(weights={"trained float32": 100}, activations={"LLM": 20}, per_picture=10, batch=2)
    assert [made.largest_batch(memory) for memory in (119, 120, 130, 90, 1000)] == [1, 2, 3, 0, 90]


def test_the_command(capsys, monkeypatch):
    asked = []

    def remembered(config, work, **options):
        asked.append((config, work, options))
        return Plan(weights={"frozen int8": int(7e9)}, activations={"LLM": int(1e9)}, per_picture=int(1e9))

    monkeypatch.setattr("visionllm.train.plan.plan", remembered)
    assert command.main("--preset r50-7b --gpus 8 --memory 12 --checkpointing --base int8".split()) == 0
    out = capsys.readouterr().out
    assert "weights, frozen int8" in out and "8.000 GB: fits 12 GB" in out
    assert out.splitlines()[-2].split()[-1] == "5"
    config, work, options = asked[0]
    assert (config.base_dtype, work.height, work.width) == ("int8", 800, 1333)
    assert (options["parallel"], options["gpus"], options["checkpointing"]) == ("fsdp", 8, True)
    assert command.main(["--memory", "4", "--image-size", "320", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["fits"], found["largest_batch"], found["total"]) == (False, 0, 8e9)
    assert asked[1][0] == replace(PRESETS["tiny"], image_size=320)
    with pytest.raises(SystemExit):
        command.main(["--image-size", "80by80"])
    assert Workload(prefix=10, groups=500).fitting(PRESETS["tiny"]).groups == 64 + 12


@pytest.mark.parametrize("name", ["r50-7b", "r50-7b-24gb"])
def test_the_recipes_load(name):
    assert name in preset_names()
    config = load_config(name)
    assert (config.lr, config.global_batch, config.preset) == (2e-4, 32, "r50-7b")
    assert config.steps == 50 * -(-118_287 // 32)  # COCO's train2017
