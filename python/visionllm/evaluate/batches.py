"""Prompts to samples' pictures, some at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from visionllm.evaluate.samples import SampleSet

Asked = TypeVar("Asked")


def batches(
    dataset: SampleSet, prompts: Sequence[tuple[int, Asked]], batch_size: int
) -> Iterator[tuple[Sequence[tuple[int, Asked]], list[np.ndarray]]]:
    """The prompts, (position of the sample, what is asked), with the pictures they are about.

    A picture that several prompts of a batch are about is read once.

    Raises:
        ValueError: batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    for start in range(0, len(prompts), batch_size):
        chosen = prompts[start : start + batch_size]
        pictures = {index: dataset.read(dataset.images[index]) for index in {index for index, _ in chosen}}
        yield chosen, [pictures[index] for index, _ in chosen]
