"""Several training processes: joining them, and averaging their gradients in one flat all-reduce.

All gradients live in one flat buffer (each ``parameter.grad`` is a view of it), which is all-reduced once
after the backward pass, followed by a handful of numbers on which the processes must agree (was a loss
non-finite, has a signal arrived, how long did the step take). Compared with DistributedDataParallel this
needs no hooks and no search for unused parameters, and on CPU loses nothing: with one thread per process
there is no idle core on which communication could overlap with the backward pass.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# A suspended process must not break the others' collectives.
_TIMEOUT = timedelta(hours=24)


@dataclass(frozen=True)
class Processes:
    """This process among all training processes."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the logs and checkpoints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank order, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with those of the first process."""
        if self.size > 1:
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, src=0)
                tensor.detach().copy_(whole)

    def leave(self) -> None:
        """Leave the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()


def join(device: str = "auto", group: bool = False) -> Processes:
    """Join the processes that the environment describes (torchrun's variables); alone when it describes none.

    Args:
        device: "auto" (CUDA when usable), "cpu" or "cuda". Uses gloo on CPU and nccl on CUDA.
        group: also alone there is to be a process group, as torch's engines need it.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device=cuda, but torch finds no usable CUDA device")
    on_cuda = device != "cpu" and torch.cuda.is_available()
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    place = torch.device("cpu")
    if on_cuda:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    if size > 1:
        if not dist.is_initialized():
            dist.init_process_group("nccl" if on_cuda else "gloo", timeout=_TIMEOUT)
    elif group and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if on_cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT
        )
    return Processes(rank, size, place)


def check_trained(network: nn.Module) -> None:
    """Raises ValueError for a trained parameter that is not float32."""
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ValueError(f"trained parameters must be float32, {name} is {parameter.dtype}")


def running_statistics(network: nn.Module) -> list[Tensor]:
    """Batch normalisation's running means and variances."""
    return [
        buffer
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]


class SharedGradients:
    """The gradients of these parameters in one flat buffer, averaged over all processes by :meth:`reduce`.

    Never set ``parameter.grad`` to None while this object is in use (``zero_grad(set_to_none=True)`` does):
    call :meth:`zero`. A parameter that took no part in the loss has gradient 0. Running statistics of batch
    normalisation are averaged too, so that all processes hold the same network after every step.
    """

    def __init__(self, network: nn.Module, processes: Processes, numbers: int) -> None:
        check_trained(network)
        self.network: Any = network
        self.processes = processes
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.statistics = running_statistics(network)
        count = sum(p.numel() for p in self.parameters)
        extra = sum(b.numel() for b in self.statistics)
        self.buffer = torch.zeros(count + extra + numbers, device=processes.device)
        self.gradients = self.buffer[:count]  # [count]
        self._statistics = self.buffer[count : count + extra]
        self._numbers = self.buffer[count + extra :]
        self._good_statistics = [buffer.clone() for buffer in self.statistics]
        offset = 0
        for parameter in self.parameters:
            # The same strides as the parameter's, which fused optimisers rely on.
            parameter.grad = self.buffer.as_strided(parameter.size(), parameter.stride(), offset)
            offset += parameter.numel()

    def zero(self) -> None:
        """Set all gradients to 0."""
        self.gradients.zero_()

    def loss(self, batch: Any, last: bool) -> dict[str, Tensor]:
        """``network.loss(batch)``."""
        return self.network.loss(batch)

    def backward(self, total: Tensor, good: bool) -> None:
        """Add the gradients of a finite loss."""
        if good:
            total.backward()

    def whole(self) -> Any:
        """As in :class:`~visionllm.train.parallel.Parallel`: every process has the whole network."""
        return nullcontext()

    def state_dict(self) -> None:
        """As in :class:`~visionllm.train.parallel.Parallel`."""

    @torch.no_grad()
    def reduce(self, numbers: Sequence[float]) -> list[float]:
        """Average gradients and ``numbers`` over all processes; returns the averaged numbers (float32)."""
        if self.processes.size == 1:
            return [float(number) for number in numbers]
        self._numbers.copy_(torch.tensor(list(numbers), dtype=torch.float32))
        if self.statistics:
            torch.cat([buffer.reshape(-1) for buffer in self.statistics], out=self._statistics)
        dist.all_reduce(self.buffer)
        self.buffer.div_(self.processes.size)
        offset = 0
        for buffer in self.statistics:
            buffer.copy_(self._statistics[offset : offset + buffer.numel()].view_as(buffer))
            offset += buffer.numel()
        return [float(number) for number in self._numbers.tolist()]

    @torch.no_grad()
    def settle(self, good: bool) -> None:
        """Keep the running statistics of this step or, after a bad step, put back the last good ones."""
        for buffer, kept in zip(self.statistics, self._good_statistics, strict=True):
            if good:
                kept.copy_(buffer)
            else:
                buffer.copy_(kept)

    @torch.no_grad()
    def clip(self, limit: float) -> float:
        """Scale the gradients down to norm ``limit`` if above it (0 = never); returns the norm before."""
        norm = float(torch.linalg.vector_norm(self.gradients))
        if 0 < limit < norm < float("inf"):
            self.gradients.mul_(limit / norm)
        return norm
