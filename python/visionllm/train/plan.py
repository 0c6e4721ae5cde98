"""Memory of a training run, by part, before there is a machine for it (``visionllm plan``).

Nothing is allocated: the network is built of fake tensors, which have shapes, types and lifetimes but no
memory, and a training step is walked through forward and back with them. What lives when most does is the
activations' share, whatever the layers are. Of the LLM, whose layers are all alike, two are walked.
Weights, gradients and optimiser state are counted by parameter, and divided as the engine
(:mod:`visionllm.train.parallel`) divides them. Not seen: workspaces inside kernels, an allocator's gaps
(``GAPS``), CUDA's context and collectives' own buffers (``CONTEXT``).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from visionllm.model.config import STRIDES, ModelConfig
from visionllm.train.parallel import BLOCKS, checkpoint_blocks

GAPS = 0.05  # of the activations: what PyTorch's caching allocator leaves unused between them
CONTEXT = int(1.2e9)  # bytes: CUDA context, kernels' code, NCCL's buffers
LLM, BACKWARD = "LLM", "of the backward pass"
PARTS = {
    "image_tokenizer.backbone": "backbone",
    "image_tokenizer": "image tokenizer",
    "text_encoder": "text encoder",
    "llm": LLM,
}
WALKED_LAYERS = 2  # of the LLM


@dataclass(frozen=True)
class Workload:
    """What a step works on; the defaults are usual detection prompts."""

    batch: int = 1  # pictures a process and micro-batch
    height: int = 224  # pixels
    width: int = 224
    prefix: int = 400  # tokens before the slots, M image tokens among them
    text: int = 40  # tokens of the description that the text encoder reads
    names: int = 20  # classes listed in a prompt
    name_tokens: int = 4  # of each, for the text encoder
    known_names: int = 80  # names of the training data, which all are encoded in every step
    groups: int = 40  # of slots: matched, spare and denoising ones
    points: int = 2  # N: a group has 1 + 2N slots
    denoising: int = 12  # queries at true boxes; detector "two-stage" alone

    def fitting(self, config: ModelConfig) -> Workload:
        """Within what the network has."""
        extra = self.denoising if config.detector == "two-stage" else 0
        return replace(
            self,
            prefix=max(self.prefix, config.num_queries + 1),
            denoising=extra,
            groups=min(self.groups, config.num_queries + extra),
        )


@dataclass
class Plan:
    """Bytes a GPU, by part.

    Attributes:
        weights: by "frozen bfloat16" and the like; whole or this GPU's share.
        gradients, optimizer, average: of trained parameters.
        activations: by part of the network, at the moment when most lives.
        communication: gathered blocks and gradients on their way (fsdp).
        overhead: CONTEXT and GAPS; on a CPU 0.
        per_picture: what another picture in the batch adds, if what lives grows with the pictures.
        cache: keys and values of one picture's prefix in prediction; not part of the total.
    """

    weights: dict[str, int] = field(default_factory=dict)
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    activations: dict[str, int] = field(default_factory=dict)
    communication: int = 0
    overhead: int = 0
    per_picture: int = 0
    cache: int = 0
    batch: int = 1

    @property
    def total(self) -> int:
        parts = sum(self.weights.values()) + sum(self.activations.values())
        return parts + self.gradients + self.optimizer + self.average + self.communication + self.overhead

    def largest_batch(self, memory: float) -> int:
        """Pictures a micro-batch that fit into so many bytes; 0: not even one."""
        spare = memory - self.total
        return max(0, self.batch + int(spare // max(1, self.per_picture)))


def plan(
    config: ModelConfig,
    work: Workload,
    *,
    gpus: int = 1,
    parallel: str = "flat",
    checkpointing: bool = False,
    autocast: bool = True,
    average: bool = True,
    frozen: Sequence[str] = (),
    cuda: bool = True,
) -> Plan:
    """The memory of one of ``gpus`` processes.

    Args:
        parallel: flat | ddp | fsdp. checkpointing, frozen: as the keys of TrainConfig.
        autocast: bfloat16 autocast. average: of the weights (``ema_decay`` > 0).
        cuda: with what a GPU needs beside the tensors.
    """
    work = work.fitting(config)
    walked = replace(config, llm_layers=min(config.llm_layers, WALKED_LAYERS))
    with _fake(config, work):
        network = _network(walked, frozen)
        if checkpointing:
            checkpoint_blocks(network)
        parameters = _parameters(network, config.llm_layers)
        activations = _activations(network, work, autocast, config.llm_layers)
    result = _weights(parameters, gpus, parallel, average)
    result.activations, result.batch = activations, work.batch
    live = sum(activations.values())
    result.per_picture = live // work.batch
    if cuda:
        result.overhead = CONTEXT + int(GAPS * live)
        result.per_picture = int(result.per_picture * (1 + GAPS))
    row = 2 * config.llm_layers * config.llm_kv_heads * (config.llm_dim // config.llm_heads)
    result.cache = row * work.prefix * 2
    return result


@dataclass(frozen=True)
class _Parameter:
    """Parameters of one kind: how many, their type, and the block that they are in."""

    count: int
    dtype: torch.dtype
    trained: bool
    block: str | None

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


def _parameters(network: nn.Module, llm_layers: int) -> list[_Parameter]:
    """Of the whole network, of whose LLM some layers are there."""
    found = []
    for name, parameter in network.named_parameters():
        block = BLOCKS.match(name)
        one = _Parameter(
            parameter.numel(), parameter.dtype, parameter.requires_grad, block.group() if block else None
        )
        if not name.startswith("llm.layers."):
            found.append(one)
        elif name.startswith("llm.layers.0."):
            found += [replace(one, block=f"llm.layers.{i}") for i in range(llm_layers)]
    return found


def _weights(parameters: Sequence[_Parameter], gpus: int, parallel: str, average: bool) -> Plan:
    """All but the activations."""
    shares = gpus if parallel == "fsdp" else 1
    result = Plan()
    for one in parameters:
        name = f"{'trained' if one.trained else 'frozen'} {str(one.dtype).removeprefix('torch.')}"
        result.weights[name] = result.weights.get(name, 0) + one.bytes
    result.weights = {name: -(-size // shares) for name, size in result.weights.items()}
    result.gradients = -(-sum(one.bytes for one in parameters if one.trained) // shares)
    result.optimizer = 2 * result.gradients
    result.average = result.gradients if average else 0
    if shares > 1:
        blocks: dict[str, int] = {}
        for one in parameters:
            if one.block is not None:
                blocks[one.block] = blocks.get(one.block, 0) + one.bytes
        rest = [one for one in parameters if one.block is None]
        # Two blocks and one flat buffer; the rest whole, its gradients whole until the end of the backward
        # pass, and once more in the order in which they are scattered.
        result.communication = 3 * max(blocks.values(), default=0) + sum(one.bytes for one in rest)
        result.communication += 2 * sum(one.bytes for one in rest if one.trained)
    return result


@contextmanager
def _fake(config: ModelConfig, work: Workload) -> Iterator[None]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from visionllm.model.image_tokenizer import _grid

    _forget_kept_tensors()
    try:
        if config.detector == "two-stage":  # a table whose making looks at values, which fake tensors lack
            shapes = tuple((-(-work.height // s), -(-work.width // s)) for s in STRIDES)
            _grid(shapes, config.dim, torch.device("cpu"))
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        _forget_kept_tensors()


def _forget_kept_tensors() -> None:
    """Tables that the model's functions keep must not mix with fake ones."""
    for name, module in list(sys.modules.items()):
        if name.startswith("visionllm.model."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def _network(config: ModelConfig, frozen: Sequence[str]) -> Any:
    from visionllm.model.network import Network

    words = object() if config.text_vocab_size else None
    tokenizer: Any = SimpleNamespace(
        vocab_size=config.vocab_size, text_vocab_size=config.text_vocab_size, text_words=words
    )
    network = Network(config, tokenizer)
    for name, parameter in network.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in frozen):
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)  # counted by themselves
    return network.train()


class _LiveMemory(TorchDispatchMode):
    """Bytes of the tensors that operators make, by part, while they live; and at the moments of the most.

    Attributes:
        most: such moments by whether most of what the LLM keeps for its backward pass is there.
    """

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.live: dict[str, int] = {}
        self.most: dict[bool, dict[str, int]] = {True: {}, False: {}}
        self._llm = 0  # the most of it
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self._note(value)
        return result

    def ignore(self, tensor: Tensor) -> None:
        """Leave a tensor that was there before out."""
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size, part = storage._cdata, storage.nbytes(), self.part
        if key in self._storages:
            return

        def gone(_: Any) -> None:
            del self._storages[key]
            self.live[part] -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.live[part] = self.live.get(part, 0) + size
        llm = self.live.get(LLM, 0)
        self._llm = max(self._llm, llm)
        whole = llm > 0.5 * self._llm
        if sum(self.live.values()) > sum(self.most[whole].values()):
            self.most[whole] = {name: count for name, count in self.live.items() if count > 0}


def _activations(network: Any, work: Workload, autocast: bool, llm_layers: int) -> dict[str, int]:
    """Bytes by part, at the moment of a step when most lives."""
    memory = _LiveMemory("slots and losses")
    for tensor in (*network.parameters(), *network.buffers()):
        memory.ignore(tensor)
        if tensor.grad is not None:
            memory.ignore(tensor.grad)
    hooks = []
    for name, part in PARTS.items():
        module, outer = network.get_submodule(name), list[str]()

        def enter(module: nn.Module, args: Any, part: str = part, outer: list[str] = outer) -> None:
            outer.append(memory.part)
            memory.part = part

        def leave(module: nn.Module, args: Any, output: Any, outer: list[str] = outer) -> None:
            memory.part = outer.pop()

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    kept: list[int] = []  # of the LLM, behind each layer
    for layer in network.llm.layers:
        hooks.append(layer.register_forward_hook(lambda *_: kept.append(memory.live.get(LLM, 0))))
    try:
        with memory, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = _forward(network, work)
        with memory:
            memory.part = BACKWARD
            total.backward()
    finally:
        for hook in hooks:
            hook.remove()
    more = max(0, kept[1] - kept[0]) * (llm_layers - len(network.llm.layers)) if len(kept) > 1 else 0
    with_llm, without = memory.most[True], memory.most[False]
    with_llm[LLM] = with_llm.get(LLM, 0) + more
    return max(with_llm, without, key=lambda parts: sum(parts.values()))


def _forward(network: Any, work: Workload) -> Tensor:
    """The tensors of ``network.loss`` in their sizes: every output of a layer counts, targets do not."""
    from visionllm.model.image_tokenizer import DenoisingQueries
    from visionllm.model.slots import SlotFormat, SlotReading
    from visionllm.model.text_encoder import mean_pool

    b, m = work.batch, network.config.num_queries

    def ids(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    name_ids = ids(b * work.names + work.known_names, work.name_tokens)
    distinct = mean_pool(network.text_encoder(name_ids), name_ids)
    names = distinct[ids(b, work.names)]
    text = torch.cat([network.text_encoder(ids(b, work.text)), names], 1)
    is_text = torch.ones(text.shape[:2], dtype=torch.bool)

    images = torch.zeros(b, work.height, work.width, 3, dtype=torch.uint8)
    denoising = None
    if work.denoising:
        denoising = cast(Any, DenoisingQueries)(torch.full((b, work.denoising, 4), 0.5))
    tokens = network.image_tokenizer(images, text, is_text, denoising)

    features, boxes = tokens.features, tokens.boxes[-1].detach()
    image = network.slot_queries.image_tokens(features[:, :m], boxes[:, :m], tokens.objectness[-1][:, :m])
    words = network.embedding(ids(b, work.prefix - m))
    prefix = torch.cat([words, image.to(words.dtype)], 1)
    kind = SlotFormat("boxes" if work.points == 2 else "outlines", work.points)
    features, boxes = features[:, : work.groups], boxes[:, : work.groups]
    slots = network.slot_queries(features, boxes, kind).to(prefix.dtype)
    read, states = network.llm(prefix, torch.ones(b, work.prefix, dtype=torch.bool), slots)

    rows = network.slot_head.rows(read[:, : work.names], names, network.class_tokens.weight)
    listed = torch.ones(b, work.names, dtype=torch.bool)
    reading = SlotReading(network.slot_head, states, rows, listed, boxes, kind.kind)
    losses = [reading.class_loss(ids(b, work.groups)).mean()]
    places = torch.zeros(b, work.groups, 2 * work.points)
    losses.append(reading.location_loss(places, torch.ones_like(places)))
    for one in (*tokens.boxes, *tokens.objectness, tokens.proposal_boxes, tokens.proposal_objectness):
        if one is not None:
            losses.append(one.float().square().mean())
    for part, layer in network.alignment.items():
        known = (tokens.memory if part == "encoder" else tokens.features)[:, : work.groups]
        logits = layer(known) @ distinct.to(known.dtype).T
        losses.append(logits.float().log_softmax(-1).mean())
    return torch.stack([loss.float() for loss in losses]).sum()
