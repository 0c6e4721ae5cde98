"""A small network and batches for tests of the training loop; as a script, a training command for them.

Keys of ``model=`` that it knows: ``delay`` (seconds per batch), ``bad`` (steps with a non-finite loss, on
rank ``bad_rank`` or all), ``fail`` (step at which rank 1 raises), ``signal`` ([step, number], sent to
itself).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from visionllm.train.command import parser, settle, train
from visionllm.train.launch import end, launch, launched


class Network(nn.Module):
    """Convolution, batch normalisation, dropout and one layer that takes no part in the loss."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3, stride=2).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.conv(images))).mean((2, 3))
        return self.head(nn.functional.dropout(features, 0.2, self.training))

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
        save_file(
            {k: v.contiguous() for k, v in self.state_dict().items()}, Path(folder) / "model.safetensors"
        )


class Batches:
    """Random pictures and targets by (seed, step, rank)."""

    def __init__(self, seed: int, rank: int, settings: dict) -> None:
        self.seed, self.rank, self.settings = seed, rank, settings

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        time.sleep(self.settings.get("delay", 0.0))
        if self.rank == 1 and step == self.settings.get("fail", -1):
            raise RuntimeError("a batch that cannot be made")
        if step == self.settings.get("signal", [-1])[0]:
            os.kill(os.getpid(), self.settings["signal"][1])
        random = np.random.default_rng((self.seed, step, self.rank))
        batch = {
            "images": random.random((4, 3, 16, 16), np.float32),
            "boxes": random.random((4, 4), np.float32),
        }
        if step in self.settings.get("bad", []) and self.settings.get("bad_rank", self.rank) == self.rank:
            batch["images"][0, 0, 0, 0] = np.nan
        return batch


def build(config, processes, resuming):
    """Network, batches and validation, as ``visionllm.train.build`` makes them for the real model."""
    return (
        Network(config.seed),
        Batches(config.seed, processes.rank, dict(config.model)),
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
