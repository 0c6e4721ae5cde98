"""Training on several processes with torch's own engines, behind one interface.

``flat``: :class:`~visionllm.train.distributed.SharedGradients`, one all-reduce behind the backward pass.
``ddp``: DistributedDataParallel, whose all-reduces run while the backward pass goes on.
``fsdp``: fully_shard (FSDP2). Every process holds a share of every parameter, in the parameter's own type: a
frozen base in bf16, what is trained (adapters, image tokenizer) in fp32, with gradients and optimiser state
for those alone. A block's parameters are gathered when it runs, all others once a step.

Whichever it is, a step is the same: gradients are averages over the micro-batches of all processes, and a
parameter that took no part in a loss has gradient 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visionllm.train.distributed import (
    Processes,
    SharedGradients,
    check_trained,
    running_statistics,
)

# Repeated modules that run equally often on all processes in every step, as collectives need it.
BLOCKS = re.compile(r"(llm\.layers|image_tokenizer\.(encoder|decoder)(\.layers)?)\.\d+")
# More whose activations weigh.
CHECKPOINTED = re.compile(
    BLOCKS.pattern + r"|text_encoder\.layers\.\d+|image_tokenizer\.backbone\.stages\.\d+\.\d+"
)
Loss = Callable[[Any], dict[str, Tensor]]
T = TypeVar("T")


class Parallel(Protocol):
    """How the processes of a run work together on a step."""

    def zero(self) -> None:
        """Set all gradients to 0."""

    def loss(self, batch: Any, last: bool) -> dict[str, Tensor]:
        """``network.loss(batch)``; ``last``: of the step's micro-batches."""

    def backward(self, total: Tensor, good: bool) -> None:
        """Add the gradients of a micro-batch, whose loss is finite or not."""

    def reduce(self, numbers: Sequence[float]) -> list[float]:
        """Average gradients (where the backward pass has not) and numbers over all processes."""

    def settle(self, good: bool) -> None:
        """Keep the running statistics of this step or, after a bad step, put back the last good ones."""

    def clip(self, limit: float) -> float:
        """Scale the gradients down to norm ``limit`` if above it (0 = never); returns the norm before."""

    def whole(self) -> Any:
        """A context in which each process can use the network alone, without gradients."""

    def state_dict(self) -> dict[str, Tensor] | None:
        """The network's whole state, gathered on the first process; None: it is there already."""


def parallel(kind: str, network: nn.Module, processes: Processes, numbers: int) -> Parallel:
    """``numbers``: of those that :meth:`Parallel.reduce` takes."""
    if kind == "flat":
        return SharedGradients(network, processes, numbers)
    return (Replicas if kind == "ddp" else Shards)(network, processes)


def checkpoint_blocks(network: nn.Module) -> int:
    """Have blocks compute their activations again in the backward pass; returns how many."""
    blocks = matching(network, CHECKPOINTED)
    for block in blocks:
        # The module's own forward alone: hooks (FSDP's gathering) stay outside.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return len(blocks)


def matching(network: nn.Module, names: re.Pattern[str]) -> list[nn.Module]:
    """Modules with such names."""
    return [module for name, module in network.named_modules() if names.fullmatch(name)]


class _Root(nn.Module):
    """What the engines wrap: its forward pass is an action on the network, such as its loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, action: Callable[[], T]) -> T:
        return action()


class _Engine:
    """What DDP and FSDP2 have in common: running statistics, numbers, gradients of unused parameters."""

    def __init__(self, network: nn.Module, processes: Processes) -> None:
        check_trained(network)
        self.network: Any = network
        self.processes = processes
        self.statistics = running_statistics(network)
        self._good = [buffer.clone() for buffer in self.statistics]

    def zero(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def backward(self, total: Tensor, good: bool) -> None:
        # A bad loss too: the others wait in their collectives. Its gradients are bad everywhere.
        total.backward()

    @torch.no_grad()
    def reduce(self, numbers: Sequence[float]) -> list[float]:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat(
            [
                *(buffer.reshape(-1) for buffer in self.statistics),
                torch.tensor(list(numbers), dtype=torch.float32, device=self.processes.device),
            ]
        )
        if self.processes.size > 1:
            dist.all_reduce(flat)
            flat.div_(self.processes.size)
        sizes = [buffer.numel() for buffer in self.statistics]
        *parts, rest = flat.split([*sizes, len(numbers)])
        for buffer, part in zip(self.statistics, parts, strict=True):
            buffer.copy_(part.view_as(buffer))
        return [float(number) for number in rest.tolist()]

    @torch.no_grad()
    def settle(self, good: bool) -> None:
        for buffer, kept in zip(self.statistics, self._good, strict=True):
            (kept if good else buffer).copy_(buffer if good else kept)

    @torch.no_grad()
    def clip(self, limit: float) -> float:
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()  # of this process's shares
        norm = float(self.over_shares(squares).sqrt())
        if 0 < limit < norm < float("inf"):
            torch._foreach_mul_(gradients, limit / norm)
        return norm

    def over_shares(self, squares: Tensor) -> Tensor:
        """The sum of squares of whole gradients, from that of what this process holds."""
        return squares


class Replicas(_Engine):
    """DistributedDataParallel. Every process holds the whole network."""

    def __init__(self, network: nn.Module, processes: Processes) -> None:
        super().__init__(network, processes)
        root = _Root(network)
        # Running statistics are averaged in `reduce`.
        buffers = [name for name, _ in root.named_buffers()]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(root, buffers)
        self.root = nn.parallel.DistributedDataParallel(
            root,
            find_unused_parameters=True,  # tasks differ in what they use
            gradient_as_bucket_view=True,
            init_sync=False,  # the run has made the processes equal
        )

    def loss(self, batch: Any, last: bool) -> dict[str, Tensor]:
        # Gradients are exchanged in the backward pass of a forward pass outside no_sync.
        with nullcontext() if last else self.root.no_sync():
            return self.root(lambda: self.network.loss(batch))

    def whole(self) -> Any:
        return nullcontext()

    def state_dict(self) -> None:
        return None


class Shards(_Engine):
    """fully_shard on every block, and on the rest of the network together.

    Every micro-batch's gradients are scattered at once: shares of them are all that is kept.
    """

    def __init__(self, network: nn.Module, processes: Processes) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        from visionllm.train.sharded_checkpoint import storage

        storage()  # an old torch is told of at the start, not at the first checkpoint
        super().__init__(network, processes)
        for parameter in network.parameters():
            parameter.data = parameter.data.contiguous()  # channels-last kernels cannot be sharded
        settings: Any = {
            "mesh": init_device_mesh(processes.device.type, (processes.size,)),
            # Gathered in their own types, computed in autocast's as without shards, summed in fp32.
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        }
        self.blocks = matching(network, BLOCKS)
        for block in self.blocks:
            fully_shard(block, reshard_after_forward=True, **settings)
        inside = {id(p) for block in self.blocks for p in block.parameters()}
        self._gathered_once = {
            name for name, p in network.named_parameters() if p.requires_grad and id(p) not in inside
        }
        self.root: Any = fully_shard(_Root(network), reshard_after_forward=False, **settings)

    def loss(self, batch: Any, last: bool) -> dict[str, Tensor]:
        return self.root(lambda: self._loss(batch))

    def _loss(self, batch: Any) -> dict[str, Tensor]:
        losses = self.network.loss(batch)
        # What gets a gradient must be the same on all processes, but a batch without objects uses less.
        touched = [p.reshape(-1)[:1] for n, p in self.network.named_parameters() if n in self._gathered_once]
        return {**losses, "total": losses["total"] + 0.0 * torch.cat(touched).sum()} if touched else losses

    def over_shares(self, squares: Tensor) -> Tensor:
        if self.processes.size > 1:
            dist.all_reduce(squares)
        return squares

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All parameters are whole inside: passes may differ from process to process."""
        with torch.no_grad():
            self.root(lambda: None)  # FSDP's own first-time preparations start at its root
            modules = [*self.blocks, self.root]
            for module in modules:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
            for parameter in self.network.parameters():
                # Gathered values may lie where older ones lay; what is kept of those is to notice.
                torch.autograd.graph.increment_version(parameter)
        try:
            yield
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not self.root, recurse=False)

    def state_dict(self) -> dict[str, Tensor]:
        whole = {}
        for name, value in self.network.state_dict().items():
            value = value.full_tensor() if is_sharded(value) else value
            if self.processes.first:
                whole[name] = value.detach().cpu()
        return whole


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds but a share of it."""
    return hasattr(tensor, "device_mesh")  # a DTensor's, whose import takes a while


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor (of an unsharded one: the tensor), sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def share(tensor: Tensor, like: Tensor | None) -> Tensor:
    """A whole tensor as ``like`` is: this process's share of it, where that is one and of the same shape."""
    if like is None or not is_sharded(like) or like.shape != tensor.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed: Any = like
    return distribute_tensor(
        tensor.to(placed.device), placed.device_mesh, placed.placements, src_data_rank=None
    )


def with_state(network: Any, state: Mapping[str, Tensor] | None) -> Any:
    """A context in which ``network.state_dict()`` is this state."""
    return nullcontext() if state is None else _with_state(network, state)


@contextmanager
def _with_state(network: Any, state: Mapping[str, Tensor]) -> Iterator[None]:
    network.state_dict = lambda *args, **kwargs: dict(state)
    try:
        yield
    finally:
        del network.state_dict
