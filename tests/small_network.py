"""A network of a few thousand values beside its backbone, and batches for it: quick, and random all over."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import visionllm
from visionllm.data.train_batch import TrainBatch
from visionllm.instruction import Instruction
from visionllm.model.config import ModelConfig
from visionllm.model.network import Network, build_network
from visionllm.tokenizer import Tokenizer

TOKENIZER_FILE = Path(visionllm.__file__).parent / "weights" / "tiny" / "tokenizer.model"
SMALL = ModelConfig(
    image_size=64,
    text_dim=32,
    text_layers=1,
    text_heads=2,
    dim=32,
    heads=4,
    points=2,
    encoder_layers=1,
    decoder_layers=2,
    ffn_dim=48,
    num_queries=12,
    fusion_heads=2,
    fusion_gate=0.5,
    llm_dim=32,
    llm_layers=2,
    llm_heads=4,
    llm_kv_heads=2,
    llm_ffn_dim=48,
    lora_rank=2,
)
NAMES = ("dog", "red car", "teddy bear", "person", "cup")


def small_network(seed: int = 0, **changes: Any) -> Network:
    """A random network; what starts at zero or one is moved too, so that every path carries something."""
    config = dataclasses.replace(SMALL, **changes)
    network = build_network(config, Tokenizer.from_file(TOKENIZER_FILE), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".backbone." not in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def pictures(count: int, size: int = SMALL.image_size, seed: int = 0) -> torch.Tensor:
    """uint8 [count, size, size, 3]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)


def train_batch(
    boxes: Sequence[Sequence[Sequence[float]]],
    labels: Sequence[Sequence[int]],
    ignore: Sequence[Sequence[Sequence[float]]] | None = None,
    unlisted: Sequence[Sequence[Sequence[float]]] | None = None,
    classes: tuple[str, ...] = NAMES[:3],
    seed: int = 0,
) -> TrainBatch:
    """One picture of noise per entry of boxes; boxes are cxcywh in 0..1."""

    def arrays(rows: Sequence[Sequence[Sequence[float]]] | None) -> list[np.ndarray]:
        rows = [()] * len(boxes) if rows is None else rows
        return [np.array(row, np.float32).reshape(-1, 4) for row in rows]

    instruction = Instruction(classes=classes)
    instruction = dataclasses.replace(instruction, text=instruction.render())
    return TrainBatch(
        images=pictures(len(boxes), seed=seed).numpy(),
        boxes=arrays(boxes),
        labels=[np.array(row, np.int64) for row in labels],
        instructions=[instruction] * len(boxes),
        ignore=arrays(ignore),
        unlisted=arrays(unlisted),
        unlisted_names=[["truck"] * len(row) for row in arrays(unlisted)],
        source=["noise"] * len(boxes),
        photo=[b % 2 == 1 for b in range(len(boxes))],
    )


def two_pictures() -> TrainBatch:
    """Two objects and one; an area to ignore and an object that is not listed."""
    return train_batch(
        boxes=[[[0.3, 0.3, 0.3, 0.4], [0.7, 0.6, 0.4, 0.5]], [[0.5, 0.5, 0.6, 0.3]]],
        labels=[[0, 2], [1]],
        ignore=[[], [[0.8, 0.2, 0.3, 0.3]]],
        unlisted=[[[0.8, 0.1, 0.2, 0.2]], []],
    )


def asking(batch: TrainBatch, instruction: Instruction, **changes: Any) -> TrainBatch:
    """The batch with another instruction for all its pictures."""
    instruction = dataclasses.replace(instruction, text=instruction.render())
    return dataclasses.replace(
        batch, task=instruction.task, instructions=[instruction] * len(batch.images), **changes
    )


def outlines_batch(points: int = 6) -> TrainBatch:
    """`two_pictures` asked for outlines: ellipses in the boxes."""
    batch = two_pictures()
    angle = 2 * np.pi * np.arange(points) / points
    circle = np.stack([np.sin(angle), -np.cos(angle)], -1) / 2  # clockwise from the top
    outlines = [(box[:, None, :2] + circle * box[:, None, 2:]).astype(np.float32) for box in batch.boxes]
    return asking(batch, Instruction("segmentation", classes=NAMES[:3], points=points), points=outlines)


def keypoints_batch(names: Sequence[str] = ("left eye", "tail")) -> TrainBatch:
    """`two_pictures` asked for keypoints: visible, hidden and not labelled ones."""
    batch, rng = two_pictures(), np.random.default_rng(0)
    flags = [rng.integers(0, 3, (len(box), len(names))) for box in batch.boxes]
    flags[0][0, 0], flags[1][0, 0] = 2, 1
    places = [
        ((box[:, None, :2] + rng.uniform(-0.5, 0.5, (len(box), len(names), 2)) * box[:, None, 2:])
         * (flag > 0)[..., None]).astype(np.float32)
        for box, flag in zip(batch.boxes, flags, strict=True)
    ]  # fmt: skip
    asked = Instruction("keypoints", classes=NAMES[:3], keypoints=tuple(names), points=len(names))
    return asking(batch, asked, points=places, visibility=flags)


def text_batch(
    task: str = "vqa",
    answers: Sequence[str] = ("no", "two dogs"),
    formats: Sequence[tuple[str, str]] = (),
) -> TrainBatch:
    """Two pictures of noise with a question or to be described."""
    question = {"question": "How many dogs?"} if task == "vqa" else {}
    return asking(
        train_batch([[], []], [[], []]),
        Instruction(task, **question),
        answers=list(answers),
        formats=list(formats),
    )
