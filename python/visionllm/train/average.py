"""Exponential moving average of the weights: average <- d * average + (1 - d) * weights.

The decay grows as min(decay, (1 + t) / (10 + t)) over updates t, so that the random initial weights are
forgotten early in short runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1.0 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the averaged weights inside the ``with`` block and its own again afterwards."""
        own: dict[str, Tensor] = {name: value.data for name, value in self.parameters.items()}
        try:
            for name, value in self.parameters.items():
                value.data = self.averages[name]
            yield
        finally:
            for name, value in self.parameters.items():
                value.data = own[name]
