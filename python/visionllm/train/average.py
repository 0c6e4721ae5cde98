"""Exponential moving average of the weights: average <- d * average + (1 - d) * weights.

The decay grows as min(decay, (1 + t) / (10 + t)) over updates t, so that the random initial weights are
forgotten early in short runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from visionllm.train.parallel import is_sharded, local


class WeightAverage:
    """Average of a network's trained parameters; buffers are not averaged."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.averages = {name: value.detach().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, weights = ([local(t) for t in of.values()] for of in (self.averages, self.parameters))
        torch._foreach_lerp_(averages, weights, 1.0 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the averaged weights inside the ``with`` block and its own again afterwards."""
        if any(is_sharded(value) for value in self.averages.values()):
            self._exchange()  # fully_shard keeps the memory of the shares
            try:
                yield
            finally:
                self._exchange()
            return
        own: dict[str, Tensor] = {name: value.data for name, value in self.parameters.items()}
        try:
            for name, value in self.parameters.items():
                value.data = self.averages[name]
            yield
        finally:
            for name, value in self.parameters.items():
                value.data = own[name]

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, value in self.parameters.items():
            own, average = local(value), local(self.averages[name])
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)
