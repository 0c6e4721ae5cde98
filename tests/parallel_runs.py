"""Runs of two processes, for test_training_parallel.py: all in one pair of processes, which starts but once.

    python -m torch.distributed.run --standalone --nproc_per_node 2 parallel_runs.py FOLDER

Each leaves its output under FOLDER/<name>.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import training_standin
from small_network import (
    asking,
    keypoints_batch,
    outlines_batch,
    small_network,
    text_batch,
    train_batch,
)
from torch import nn

from visionllm.instruction import Instruction
from visionllm.train import distributed
from visionllm.train.build import freeze
from visionllm.train.command import parser, settle, train
from visionllm.train.config import accumulation
from visionllm.train.launch import end
from visionllm.train.parallel import local

COMMON = [
    *("warmup=3", "log_every=1", "tensorboard=off", "validation.every=5", "checkpoint.minutes=0"),
    *("checkpoint.steps=4", "checkpoint.keep=3", "lr=0.003", "processes=0", "autocast=off"),
]
NETWORK = ["steps=8", "validation.every=3", "lr=0.001"]  # runs of the real network
FROZEN = ["image_tokenizer.backbone.*", *(f"llm.layers.*.{name}.weight" for name in "qkvo")]


class Batches:
    """Micro-batches of the real network: all tasks in turn, random objects, sometimes none."""

    def __init__(self, rank: int, size: int, accumulate: int) -> None:
        self.rank, self.size, self.accumulate = rank, size, accumulate

    def __getitem__(self, index: int):
        step, part = divmod(index, self.accumulate)
        number = part * self.size + self.rank
        random = np.random.default_rng((step, number))
        counts = (int(random.integers(1, 4)), 0 if number == 1 else 1)
        boxes = [random.uniform(0.2, 0.6, (count, 4)).tolist() for count in counts]
        labels = [random.integers(0, 3, count).tolist() for count in counts]
        if step == 3 and number == 1:  # no object at all, on one process alone
            boxes, labels = [[], []], [[], []]
        detection = train_batch(boxes, labels, seed=100 * step + number)
        others = (
            lambda: outlines_batch(),
            lambda: keypoints_batch(),
            lambda: text_batch(answers=("no", "two dogs") if number else ("three", "a cup")),
            lambda: asking(detection, Instruction("grounding", classes=("dog", "red car", "cup"))),
        )
        return detection if step % 2 else others[step // 2 % 4]()


def build(config, processes, resuming):
    """As ``visionllm.train.build`` does for real runs: the small network, a part of whose LLM is frozen."""
    tasks = ("detection", "segmentation", "grounding", "keypoints", "vqa")
    network = small_network(tasks=tasks, box_prior=True, word_layers=1, known_power=0.3)
    network.known_names = ("cup", "dog", "truck")
    freeze(network, FROZEN)

    def validate(network: nn.Module) -> dict[str, float]:
        # As many passes on each process as it likes.
        batch = Batches(0, 1, 1)[1]
        found = []
        for _ in range(1 + processes.rank):
            found = network.find(torch.from_numpy(batch.images), batch.instructions)
        return {"score": float(found[0].scores.sum())}

    return network, Batches(processes.rank, processes.size, accumulation(config, processes.size)), validate


def run(folder: Path, *arguments: str, network: bool = False) -> int:
    """One run, of the real network or the stand-in; its exit code."""
    kind, extra = (build, NETWORK) if network else (training_standin.build, ["steps=12"])
    known = parser().parse_intermixed_args(
        arguments if "--resume" in arguments else [*COMMON, *extra, *arguments, f"output={folder}"]
    )
    return train(*settle(known), kind)


def describe_shards() -> dict[str, object]:
    """How FSDP2 holds the small network with a bf16 base: types, shares, optimiser state."""
    from visionllm.train.parallel import Shards

    processes = distributed.join("cpu")
    network = small_network()
    freeze(network, FROZEN)
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    shards = Shards(network, processes)
    held = {name: (local(p).numel(), p.numel(), str(p.dtype)) for name, p in network.named_parameters()}
    shards.root(lambda: None)
    return {"held": held, "blocks": len(shards.blocks)}


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    distributed.join("cpu")
    distributed.Processes.leave = lambda self: None  # type: ignore[method-assign]
    rank = dist.get_rank()
    for kind in ("flat", "ddp", "fsdp"):
        run(folder / kind, f"parallel={kind}")
        run(folder / f"{kind}-accumulate", f"parallel={kind}", "accumulate=2")
        run(folder / f"{kind}-bad", f"parallel={kind}", "model.bad=[5]", "model.bad_rank=1")
        run(folder / f"{kind}-network", f"parallel={kind}", network=True)
    run(folder / "fsdp-checkpointing", "parallel=fsdp", "checkpointing=true", network=True)

    # Two processes, one, two: interrupted twice.
    resumed = folder / "resumed"
    stop = f"model.signal=[3,{int(signal.SIGTERM)}]"
    assert run(resumed, "parallel=fsdp", "global_batch=8", "batch_size=4", stop) == 130
    if rank == 0:
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        stop = f"model.signal=[7,{int(signal.SIGTERM)}]"
        command = [sys.executable, training_standin.__file__, "--resume", str(resumed), "processes=0", stop]
        code = subprocess.run(command, env=alone, check=False).returncode
        assert code == 130, code
    dist.barrier()
    assert run(resumed, "--resume", str(resumed), "model.signal=[-1]") == 0
    torch.save(describe_shards(), folder / f"shards-{rank}.pt")
    return 0


if __name__ == "__main__":
    end(main(Path(sys.argv[1])))
