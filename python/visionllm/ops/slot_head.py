"""The head that reads slots: what its prediction and its cross-entropy share.

    normed = states / sqrt(mean(states^2) + epsilon) * norm_weight             without norm_weight: states
    logits = scale * normed @ rows^T                                           only over this kind's rows

The contract, with the meaning of the shape letters, is in ``cpp/include/visionllm/slot_head.h``. On the CPU
and on CUDA the compiled kernels run, which never write the logits as a whole; on other devices and in float64
the operators' PyTorch references, in ``slot_head_predict.py`` and ``slot_head_cross_entropy_reference.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visionllm import _core
from visionllm.ops import fallback, native

__all__ = ["SampleInputs", "sample_inputs"]

# Calls by their numbers in SlotHeadCall.
PREDICT, CROSS_ENTROPY, BACKWARD = 0, 1, 2

library = torch.library.Library("visionllm", "FRAGMENT")


def operands(
    operator: str,
    states: Tensor,
    rows: Tensor,
    row_scale: Tensor | None,
    valid: Tensor | None,
    norm_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """states [B, G, S, C], rows [1 or B, V, C], row_scale [1 or B, V] and norm_weight.

    All but int8 rows and their scale are of the states' type.
    """
    if states.dim() not in (3, 4):
        raise ValueError(
            f"{operator}: states must have shape [B, G, C] or [B, G, S, C], got {list(states.shape)}"
        )
    fallback.check_real(operator, "states", states, states.device)
    if rows.dim() not in (2, 3):
        raise ValueError(
            f"{operator}: rows must have shape [V, C], [1, V, C] or [B, V, C], got {list(rows.shape)}"
        )
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"{operator}: valid must be bool, got {fallback.type_name(valid)}")
    if row_scale is not None and row_scale.shape != rows.shape[:-1]:
        raise ValueError(
            f"{operator}: row_scale must have the rows' shape without C = {list(rows.shape[:-1])}, got "
            f"{list(row_scale.shape)}"
        )
    check_types(operator, states, rows, row_scale)
    if rows.dim() == 2:
        rows, row_scale = rows.unsqueeze(0), None if row_scale is None else row_scale.unsqueeze(0)
    return (
        states if states.dim() == 4 else states.unsqueeze(2),
        rows.to(states.dtype) if row_scale is None else rows,
        None if row_scale is None else row_scale.detach().float(),
        None if norm_weight is None else norm_weight.to(states.dtype),
    )


# ---- reference ------------------------------------------------------------------------------------------


def check_types(operator: str, states: Tensor, rows: Tensor, row_scale: Tensor | None) -> None:
    """Rows are floating point, or int8 with a scale."""
    if row_scale is None:
        if rows.dtype == torch.int8:
            raise ValueError(f"{operator}: row_scale must be given with int8 rows, got none")
        fallback.check_real(operator, "rows", rows, states.device)
    elif rows.dtype != torch.int8:
        raise ValueError(
            f"{operator}: rows must be int8 where row_scale is given, got {fallback.type_name(rows)}"
        )
    else:
        fallback.check_real(operator, "row_scale", row_scale, states.device)


def check(
    operator: str,
    states: Tensor,
    rows: Tensor,
    row_scale: Tensor | None,
    valid: Tensor | None,
    norm_weight: Tensor | None,
    target: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """What reference and kernels ask for alike, as the core says it."""
    fallback.check_rank(operator, "states", states, "[B, G, S, C]")
    fallback.check_rank(operator, "rows", rows, "[R, V, C]")
    batch, groups, slots, channels = states.shape
    fallback.check_real(operator, "states", states, states.device)
    check_types(operator, states, rows, row_scale)
    if rows.shape[0] not in (1, batch) or rows.shape[1] < 1 or rows.shape[2] != channels:
        raise ValueError(
            f"{operator}: rows must have shape [1 or B, V, C] = [1 or {batch}, 1 or more, {channels}], got "
            f"{list(rows.shape)}"
        )
    if row_scale is not None:
        fallback.check_shape(operator, "row_scale", row_scale, "[R, V]", rows.shape[:2])
    if valid is not None:
        fallback.check_shape(operator, "valid", valid, "[B, V]", (batch, rows.shape[1]))
        if valid.dtype != torch.bool:
            raise ValueError(f"{operator}: valid must be bool, got {fallback.type_name(valid)}")
    if norm_weight is not None:
        fallback.check_shape(operator, "norm_weight", norm_weight, "[C]", (channels,))
        fallback.check_real(operator, "norm_weight", norm_weight, states.device)
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None:
            fallback.check_shape(operator, name, tensor, "[B, G, S]", (batch, groups, slots))
    if target is not None and not target.is_floating_point():
        fallback.check_integer(operator, "target", target, states.device)


def accumulator(states: Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def inverse_norm(x: Tensor, epsilon: float) -> Tensor:
    """[..., C] → [..., 1]"""
    return (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def rms_normed(states: Tensor, norm_weight: Tensor | None, epsilon: float) -> Tensor:
    """RMS norm, rounded to the states' type."""
    if norm_weight is None:
        return states
    x = states.to(accumulator(states))
    return (x * inverse_norm(x, epsilon) * norm_weight.to(x.dtype)).to(states.dtype)


def exact_rows(rows: Tensor, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return rows.to(dtype) if row_scale is None else rows.to(dtype) * row_scale.to(dtype)[..., None]


def slot_logits(
    states: Tensor,
    rows: Tensor,
    row_scale: Tensor | None,
    valid: Tensor | None,
    norm_weight: Tensor | None,
    epsilon: float,
    scale: float,
) -> Tensor:
    """[B, G, S, V], −inf where a row is not allowed."""
    dtype = accumulator(states)
    normed = rms_normed(states, norm_weight, epsilon).to(dtype)
    logits = normed.flatten(1, 2) @ exact_rows(rows, row_scale, dtype).transpose(1, 2) * scale
    logits = logits.view(*states.shape[:-1], rows.shape[1])
    return logits if valid is None else logits.masked_fill(~valid[:, None, None], float("-inf"))


# ---- sample inputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleInputs:
    """Arguments of both operators; the tests, opcheck and the bench take theirs from here."""

    states: Tensor
    rows: Tensor
    valid: Tensor | None
    norm_weight: Tensor | None
    target: Tensor
    weight: Tensor | None
    epsilon: float
    scale: float
    sigma: float  # 0: the target is a row
    window: int
    offset: float
    row_scale: Tensor | None = None  # with int8 rows

    def predict_args(self, probabilities: bool = True) -> tuple:
        return (
            self.states,
            self.rows,
            self.valid,
            self.norm_weight,
            self.epsilon,
            self.scale,
            self.window,
            self.offset,
            probabilities,
            self.row_scale,
        )

    def cross_entropy_args(self) -> tuple:
        return (
            self.states,
            self.rows,
            self.target,
            self.weight,
            self.valid,
            self.norm_weight,
            self.epsilon,
            self.scale,
            self.sigma,
            self.row_scale,
        )

    def leaves(self) -> list[Tensor]:
        return [
            t for t in (self.states, self.rows, self.norm_weight) if t is not None and t.dtype != torch.int8
        ]


def sample_inputs(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    groups: int = 7,
    slots: int = 1,
    rows: int = 21,
    channels: int = 40,
    shared: bool = False,
    masked: bool = True,
    normed: bool = True,
    located: bool = False,
    weighted: bool = True,
    int8: bool = False,
    window: int = 6,
    requires_grad: bool = False,
    seed: int = 0,
) -> SampleInputs:
    """Random slots: of classes (a row is wanted, some slots ignored), or ``located`` (a place among rows).

    Args:
        rows: V. With ``masked``, each picture allows some of them, always the last: "no object".
        shared: one set of rows for all pictures.
        int8: rows in int8 with a scale each.
    """
    random = torch.Generator().manual_seed(seed)
    real = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=real)

    states = normal(batch, groups, slots, channels).to(dtype)
    table = normal(1 if shared else batch, rows, channels).to(dtype)
    row_scale = None
    if int8:
        row_scale = (table.float().abs().amax(-1) / 127).contiguous()  # [R, V]
        table = (table.float() / row_scale[..., None]).round().to(torch.int8)
    norm_weight = (1 + 0.3 * normal(channels)).to(dtype) if normed else None
    valid = None
    if masked:
        valid = torch.rand(batch, rows, generator=random) < 0.7
        valid[:, -1:] = True
    shape = (batch, groups, slots)
    if located:
        # Some beyond both ends.
        target = torch.rand(shape, generator=random, dtype=real) * (rows + 4) - 2.5
    else:
        target = torch.randint(0, rows, shape, generator=random)
        if valid is not None:  # a row that is not allowed would cost +inf
            allowed = valid[torch.arange(batch)[:, None, None], target]
            target = torch.where(allowed, target, rows - 1)
        target[torch.rand(shape, generator=random) < 0.2] = -1
    weight = None
    if weighted:
        weight = torch.rand(shape, generator=random, dtype=real) + 0.1
        weight[torch.rand(shape, generator=random) < 0.1] = 0.0
    return SampleInputs(
        states=states.to(device).requires_grad_(requires_grad),
        rows=table.to(device).requires_grad_(requires_grad and not int8),
        valid=None if valid is None else valid.to(device),
        norm_weight=None if norm_weight is None else norm_weight.to(device).requires_grad_(requires_grad),
        target=target.to(device),
        weight=None if weight is None else weight.to(device),
        epsilon=1e-5,
        scale=2 * channels**-0.5,
        sigma=1.5 if located else 0.0,
        window=window,
        offset=(rows - 1) / 2,
        row_scale=None if row_scale is None else row_scale.to(device),
    )


# ---- kernels --------------------------------------------------------------------------------------------


def aligned(tensor: Tensor, on_cuda: bool) -> Tensor:
    """The tensor if the kernels can take it where it lies, else a contiguous copy.

    Its last dimension has to be contiguous; on CUDA it is moved in pieces of 16 bytes.
    """
    fits = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    if on_cuda:
        size = tensor.element_size()
        steps = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        fits = fits and tensor.data_ptr() % 16 == 0
        fits = fits and all(n <= 1 or step * size % 16 == 0 for n, step in steps)
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def workspace(
    call: int,
    states: Tensor,
    rows: Tensor,
    valid: Tensor | None,
    normed: bool,
    window: int,
    slots_at_once: int = 0,
) -> Tensor:
    """Of a call on CUDA; on the CPU there is none."""
    size = _core.slot_head_workspace_bytes(
        call,
        *states.shape,
        rows.shape[1],
        states.element_size(),
        rows.shape[0] == 1,
        valid is not None,
        normed,
        window,
        slots_at_once,
    )
    return torch.empty(-(-size // 4), dtype=torch.float32, device=states.device)


def run_kernel(
    operator: str,
    outputs: Sequence[Tensor | None],
    space: Tensor | None,
    before: Sequence[Tensor],
    states: Tensor,
    rows: Tensor,
    row_scale: Tensor | None,
    after: Sequence[native.Argument],
) -> None:
    """Calls the core's function of this name, with "_int8" after "predict" or "entropy" for int8 rows."""
    if row_scale is None:
        native.call(operator, *outputs, space, *before, states, rows, *after)
        return
    name = operator.replace("predict", "predict_int8").replace("entropy", "entropy_int8")
    native.call(name, *outputs, *before, states, rows, aligned(row_scale, False), *after)


# ---- registration ---------------------------------------------------------------------------------------


def register(operator: str, reference: Callable, cpu: Callable, cuda: Callable) -> None:
    """Kernels for the CPU, for CUDA if this build has any, and the reference, with a warning, elsewhere."""

    def elsewhere(*arguments):
        outputs = reference(*arguments)
        fallback.warn_of_reference(operator, arguments[0].device.type)
        return outputs

    library.impl(operator, cpu, "CPU")
    library.impl(operator, elsewhere, "CompositeExplicitAutograd")
    if native.has_cuda_kernels():
        library.impl(operator, cuda, "CUDA")
