"""A small network and batches for tests of the training loop; as a script, a training command for them.

Keys of ``model=`` that it knows: ``batch_norm``, ``dropout``, ``pictures`` (4 per micro-batch),
``delay`` (seconds per batch), ``bad`` (steps with a non-finite loss, on rank ``bad_rank`` or all), ``fail``
(step at which rank 1 raises), ``signal`` ([step, number], sent to itself), ``full`` ([from, to], steps at
which the disk takes no file above 1000 bytes).
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from visionllm.tensor_file import write_tensors
from visionllm.train.command import parser, settle, train
from visionllm.train.config import accumulation
from visionllm.train.launch import end, launch, launched


class Network(nn.Module):
    """Convolution, batch normalisation, dropout and one layer that takes no part in the loss.

    ``batch_norm=False``: none, so that a batch is the sum of its parts; ``dropout=0`` likewise.
    """

    def __init__(self, seed: int, batch_norm: bool = True, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.dropout = dropout
        self.conv = nn.Conv2d(3, 8, 3, stride=2).to(memory_format=torch.channels_last)
        self.norm: nn.Module = nn.BatchNorm2d(8) if batch_norm else nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.conv(images))).mean((2, 3))
        return self.head(nn.functional.dropout(features, self.dropout, self.training))

    def loss(self, batch: dict) -> dict[str, torch.Tensor]:
        answer = self(torch.from_numpy(batch["images"])).float()
        box = nn.functional.smooth_l1_loss(answer, torch.from_numpy(batch["boxes"]))
        size = 0.1 * answer.square().mean()
        return {"box": box, "size": size, "total": box + size, "metric/mean": answer.mean().detach()}

    def parameter_groups(self, lr: float, backbone_lr: float, weight_decay: float) -> list[dict]:
        rest = [*self.norm.parameters(), *self.head.parameters(), *self.unused.parameters()]
        return [
            {"params": list(self.conv.parameters()), "lr": backbone_lr, "weight_decay": weight_decay},
            {"params": rest, "lr": lr, "weight_decay": 0.0},
        ]

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_tensors(Path(folder) / "model.safetensors", self.state_dict())


class Batches:
    """Random pictures and targets by (seed, step, number of the micro-batch)."""

    def __init__(self, seed: int, rank: int, settings: dict, size: int = 1, accumulate: int = 1) -> None:
        self.seed, self.rank, self.settings = seed, rank, settings
        self.size, self.accumulate = size, accumulate

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, part = divmod(index, self.accumulate)
        number = part * self.size + self.rank
        time.sleep(self.settings.get("delay", 0.0))
        if self.rank == 1 and step == self.settings.get("fail", -1):
            raise RuntimeError("a batch that cannot be made")
        if step == self.settings.get("signal", [-1])[0]:
            os.kill(os.getpid(), self.settings["signal"][1])
        # As many pictures as several micro-batches have are theirs.
        parts = self.settings.get("pictures", 4) // 4
        batch = {
            "images": np.zeros((4 * parts, 3, 16, 16), np.float32),
            "boxes": np.zeros((4 * parts, 4), np.float32),
        }
        for k in range(parts):
            random = np.random.default_rng((self.seed, step, number + k))
            for values in batch.values():
                values[4 * k : 4 * k + 4] = random.random(values[4 * k : 4 * k + 4].shape, np.float32)
        if step in self.settings.get("full", []):
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            start = step == self.settings["full"][0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if start else limits[1], limits[1]))
        if step in self.settings.get("bad", []) and self.settings.get("bad_rank", number) == number:
            batch["images"][0, 0, 0, 0] = np.nan
        return batch


def build(config, processes, resuming):
    """Network, batches and validation, as ``visionllm.train.build`` makes them for the real model."""
    return (
        Network(config.seed, **{k: config.model[k] for k in ("batch_norm", "dropout") if k in config.model}),
        Batches(
            config.seed,
            processes.rank,
            dict(config.model),
            processes.size,
            accumulation(config, processes.size),
        ),
        lambda network: {"mean": float(network.conv.weight.mean())},
    )


def main(argv: list[str]) -> int:
    """The command line of ``visionllm train`` with the stand-ins."""
    arguments = parser().parse_intermixed_args(argv)
    config, checkpoint = settle(arguments)
    if config.processes > 0 and not launched() and arguments.export is None:
        return launch(config.processes, [sys.executable, __file__, *argv])
    return train(config, checkpoint, build, arguments.export)


if __name__ == "__main__":
    end(main(sys.argv[1:]))
