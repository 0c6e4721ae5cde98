"""A linear layer with low-rank adapters as a torch operator (Hu et al., "LoRA", ICLR 2022).

    s[t] = scale[a] * x[t] A[a]^T            with a = adapter_index[t]
    y[t] = x[t] W^T + bias + s[t] B[a]^T

The contract, with the meaning of the shape letters, is in ``cpp/include/visionllm/lora_linear.h``. The
operator runs the compiled kernels, on CUDA where the build has them; elsewhere, and in float64, the PyTorch
reference in ``lora_linear_reference.py``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visionllm import _core
from visionllm.ops import fallback, native
from visionllm.ops.direct import past_dispatcher
from visionllm.ops.lora_linear_reference import (
    check_arguments,
    lora_linear_backward_reference,
    lora_linear_reference,
)
from visionllm.ops.native import Argument

__all__ = ["SampleInputs", "lora_linear", "lora_linear_reference", "sample_inputs"]

_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float | Tensor = 1.0,
    adapter_index: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scale * (x A^T) B^T; differentiable in x, A and B. The base is frozen.

    Args:
        x: [..., K] float32, bfloat16 or float16 (float64 takes the slow reference).
        weight: [N, K] of x's type, or int8 with ``weight_scale``.
        bias: [N] of x's type.
        lora_a: [E, R, K] of x's type, one A for each of E adapters of rank R (1 to 128); [R, K] for a single
            one. Without ``lora_a`` and ``lora_b`` this is a plain linear layer.
        lora_b: [E, N, R], or [N, R], likewise.
        scale: of the adapters' output, usually alpha / rank; [E] float32 gives each adapter its own.
        adapter_index: int64, the adapter of each row: x's shape without its last dimension. Any order goes;
            a number outside 0 .. E - 1, -1 by convention, is a row without adapter. None: adapter 0
            everywhere.
        weight_scale: [N] float32: row n of the base is ``weight_scale[n] * weight[n]``. Only with int8.

    Returns:
        [..., N] of x's type. Forward and backward are deterministic. Under autocast x, a floating-point
        weight, bias, A and B are converted as for ``torch.nn.functional.linear``.

    Raises:
        ValueError: a shape or type does not fit, or the base or the scales require a gradient, which this
            operator does not compute.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        weight = weight.to(dtype) if weight.is_floating_point() else weight
        bias = None if bias is None else bias.to(dtype)
        lora_a = None if lora_a is None else lora_a.to(dtype)
        lora_b = None if lora_b is None else lora_b.to(dtype)
    scales = scale if isinstance(scale, Tensor) else None
    if torch.is_grad_enabled():
        for name, frozen in (
            ("weight", weight),
            ("bias", bias),
            ("scale", scales),
            ("weight_scale", weight_scale),
        ):
            if frozen is not None and frozen.requires_grad:
                raise ValueError(
                    f"lora_linear: {name} must not require gradients, since base and scales are frozen: call "
                    f"{name}.requires_grad_(False) or pass {name}.detach()"
                )
    if lora_a is not None and lora_a.dim() == 2:
        lora_a = lora_a.unsqueeze(0)
    if lora_b is not None and lora_b.dim() == 2:
        lora_b = lora_b.unsqueeze(0)
    dimensions = x.dim()
    if dimensions == 0:
        raise ValueError("lora_linear: x must have shape [..., K], got []")
    rows = x.shape[:-1]
    if adapter_index is not None and adapter_index.shape != rows:
        raise ValueError(
            f"lora_linear: adapter_index must have x's shape without its last dimension = {list(rows)}, got "
            f"{list(adapter_index.shape)}"
        )
    output, _ = _lora_linear(
        x if dimensions == 2 else x.reshape(rows.numel(), x.shape[-1]),
        weight,
        weight_scale,
        bias,
        lora_a,
        lora_b,
        scales,
        None if adapter_index is None else adapter_index.reshape(-1),
        float(scale) if scales is None else 1.0,
    )
    return output if dimensions == 2 else output.view(*rows, weight.shape[0])


@dataclass(frozen=True)
class SampleInputs:
    """Arguments of ``lora_linear`` in order; the tests, opcheck and the bench take theirs from here."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    scale: float | Tensor
    adapter_index: Tensor | None
    weight_scale: Tensor | None

    def args(
        self,
    ) -> tuple[
        Tensor,
        Tensor,
        Tensor | None,
        Tensor | None,
        Tensor | None,
        float | Tensor,
        Tensor | None,
        Tensor | None,
    ]:
        return (
            self.x,
            self.weight,
            self.bias,
            self.lora_a,
            self.lora_b,
            self.scale,
            self.adapter_index,
            self.weight_scale,
        )

    def operator_args(self) -> tuple[Tensor | float | None, ...]:
        """The same as ``torch.ops.visionllm.lora_linear`` takes them (x [T, K])."""
        tensor = isinstance(self.scale, Tensor)
        return (
            self.x,
            self.weight,
            self.weight_scale,
            self.bias,
            self.lora_a,
            self.lora_b,
            self.scale if tensor else None,
            self.adapter_index,
            1.0 if tensor else float(self.scale),
        )


def sample_inputs(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    rows: int = 37,
    inputs: int = 48,
    outputs: int = 40,
    rank: int = 8,
    adapters: int = 1,
    indexed: bool = False,
    bias: bool = True,
    int8: bool = False,
    requires_grad: bool = False,
    seed: int = 0,
) -> SampleInputs:
    """Random inputs whose outputs are about 1; the adapters add as much as the base.

    With ``indexed`` each row draws its adapter, or none, at random, and each adapter has a scale of its own.
    ``adapters=0`` is a plain linear layer.
    """
    random = torch.Generator().manual_seed(seed)
    real = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(*shape, generator=random, dtype=real) / max(fan_in, 1) ** 0.5).to(dtype)

    x = draw(rows, inputs)
    weight = draw(outputs, inputs, fan_in=inputs)
    weight_scale = None
    if int8:
        weight_scale = weight.to(real).abs().amax(1) / 127 if inputs else torch.ones(outputs, dtype=real)
        weight = (weight.to(real) / weight_scale[:, None]).round().to(torch.int8)
    lora_a = draw(adapters, rank, inputs, fan_in=inputs) if adapters else None
    lora_b = draw(adapters, outputs, rank, fan_in=rank) if adapters else None
    scale: float | Tensor = 0.75 if adapters else 1.0
    index = None
    if indexed:
        scale = torch.rand(adapters, generator=random, dtype=real) + 0.5
        index = torch.randint(-1, adapters, (rows,), generator=random)

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.to(device).requires_grad_(requires_grad)

    def put(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    scale = scale.to(device) if isinstance(scale, Tensor) else scale
    offsets = put(draw(outputs)) if bias else None
    return SampleInputs(
        leaf(x),
        weight.to(device),
        offsets,
        None if lora_a is None else leaf(lora_a),
        None if lora_b is None else leaf(lora_b),
        scale,
        put(index),
        put(weight_scale),
    )


# ---- the kernels ------------------------------------------------------------------------------------------


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """[rows, columns] with the elements of a row side by side; the rows themselves may lie anywhere."""
    if tensor.is_contiguous() or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def _adapter_arguments(
    lora_a: Tensor | None, lora_b: Tensor | None, scale: Tensor | None, adapter_index: Tensor | None
) -> tuple[Tensor | None, ...]:
    return (
        None if lora_a is None else lora_a.contiguous(),
        None if lora_b is None else lora_b.contiguous(),
        None if scale is None else scale.float().contiguous(),
        None if adapter_index is None else adapter_index.contiguous(),
    )


def _workspace(like: Tensor, bytes_needed: int) -> Tensor | None:
    return like.new_empty(bytes_needed, dtype=torch.uint8) if bytes_needed else None


# On the CPU the kernels allocate for themselves: `cuda` says whose workspace is needed.


def _forward_native(
    cuda: bool,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: Tensor | None,
    adapter_index: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    if cuda or x.dim() != 2 or weight.dim() != 2 or (lora_a is not None and lora_a.dim() != 3):
        check_arguments("lora_linear", x, weight, weight_scale, bias, lora_a, lora_b, scale, adapter_index)
    rank = 0 if lora_a is None else lora_a.shape[1]
    (count, inputs), outputs = x.shape, weight.shape[0]
    output = x.new_empty(count, outputs)
    low_rank = x.new_empty(count, rank, dtype=torch.float32)
    workspace = None
    if cuda:
        size = _core.lora_linear_workspace_bytes(count, inputs, outputs, rank, x.element_size())
        workspace = _workspace(x, size)
    arguments: tuple[Argument, ...] = (
        output,
        low_rank if rank else None,
        workspace,
        _rows_contiguous(x),
        _rows_contiguous(weight),
        None if weight_scale is None else weight_scale.float().contiguous(),
        None if bias is None else bias.contiguous(),
        *_adapter_arguments(lora_a, lora_b, scale, adapter_index),
        scaling,
    )
    try:
        native.call("lora_linear", *arguments)
    except ValueError:
        # The core checks for itself; what it has no name for, such as float64, is worded better here.
        check_arguments("lora_linear", x, weight, weight_scale, bias, lora_a, lora_b, scale, adapter_index)
        raise
    return output, low_rank


def _backward_native(
    cuda: bool,
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: Tensor | None,
    adapter_index: Tensor | None,
    low_rank: Tensor,
    scaling: float,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    operator = "lora_linear_backward"
    if cuda or x.dim() != 2 or weight.dim() != 2 or (lora_a is not None and lora_a.dim() != 3):
        check_arguments(operator, x, weight, weight_scale, None, lora_a, lora_b, scale, adapter_index)
    rank = 0 if lora_a is None else lora_a.shape[1]
    needs_a, needs_b = needs_a and rank > 0, needs_b and rank > 0
    grads = (
        x.new_empty(x.shape) if needs_x else x.new_empty(0),
        torch.empty_like(lora_a, memory_format=torch.contiguous_format)
        if needs_a and lora_a is not None
        else x.new_empty(0),
        torch.empty_like(lora_b, memory_format=torch.contiguous_format)
        if needs_b and lora_b is not None
        else x.new_empty(0),
    )
    if not (needs_x or needs_a or needs_b):
        return grads
    workspace = None
    if cuda:
        sizes = (x.shape[0], x.shape[1], weight.shape[0], rank, x.element_size())
        workspace = _workspace(x, _core.lora_linear_backward_workspace_bytes(*sizes))
    arguments: tuple[Argument, ...] = (
        grads[0] if needs_x else None,
        grads[1] if needs_a else None,
        grads[2] if needs_b else None,
        workspace,
        _rows_contiguous(grad_output),
        _rows_contiguous(x),
        _rows_contiguous(weight),
        None if weight_scale is None else weight_scale.float().contiguous(),
        *_adapter_arguments(lora_a, lora_b, scale, adapter_index),
        low_rank if rank else None,
        scaling,
    )
    try:
        native.call(operator, *arguments)
    except ValueError:
        check_arguments(operator, x, weight, weight_scale, None, lora_a, lora_b, scale, adapter_index)
        raise
    return grads


# ---- registration -----------------------------------------------------------------------------------------

_library = torch.library.Library("visionllm", "FRAGMENT")
_library.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? bias, Tensor? lora_a, "
    "Tensor? lora_b, Tensor? scale, Tensor? adapter_index, float scaling) -> (Tensor, Tensor)"
)
_library.define(
    "lora_linear_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor? weight_scale, Tensor? lora_a, "
    "Tensor? lora_b, Tensor? scale, Tensor? adapter_index, Tensor low_rank, float scaling, bool needs_x, "
    "bool needs_a, bool needs_b) -> (Tensor, Tensor, Tensor)"
)


_forward_cuda = functools.partial(_forward_native, True)
_backward_cuda = functools.partial(_backward_native, True)


def _forward_cpu(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _forward_native(False, x, *rest) if x.dtype in _KERNEL_TYPES else lora_linear_reference(x, *rest)


def _backward_cpu(grad_output: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype not in _KERNEL_TYPES:
        return lora_linear_backward_reference(grad_output, x, *rest)
    return _backward_native(False, grad_output, x, *rest)


def _forward_gpu(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return lora_linear_reference(x, *rest)
    return _forward_cuda(x, *rest) if native.has_cuda_kernels() else _forward_elsewhere(x, *rest)


def _backward_gpu(grad_output: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64 or not native.has_cuda_kernels():
        return lora_linear_backward_reference(grad_output, x, *rest)
    return _backward_cuda(grad_output, x, *rest)


def _forward_elsewhere(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Devices that this build has no kernels for."""
    outputs = lora_linear_reference(x, *rest)
    fallback.warn_of_reference("lora_linear", x.device.type)
    return outputs


for _key, _forward, _backward in (
    ("CPU", _forward_cpu, _backward_cpu),
    ("CUDA", _forward_gpu, _backward_gpu),
    ("CompositeExplicitAutograd", _forward_elsewhere, lora_linear_backward_reference),
):
    _library.impl("lora_linear", _forward, _key)
    _library.impl("lora_linear_backward", _backward, _key)


@torch.library.register_fake("visionllm::lora_linear", lib=_library)
def _forward_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: Tensor | None,
    adapter_index: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    check_arguments("lora_linear", x, weight, weight_scale, bias, lora_a, lora_b, scale, adapter_index)
    rank = 0 if lora_a is None else lora_a.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], rank, dtype=wide)


@torch.library.register_fake("visionllm::lora_linear_backward", lib=_library)
def _backward_fake(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: Tensor | None,
    adapter_index: Tensor | None,
    low_rank: Tensor,
    scaling: float,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape) if needs_x else x.new_empty(0),
        x.new_empty(lora_a.shape) if needs_a and lora_a is not None else x.new_empty(0),
        x.new_empty(lora_b.shape) if needs_b and lora_b is not None else x.new_empty(0),
    )


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, weight_scale, _, lora_a, lora_b, scale, adapter_index, scaling = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, weight_scale, lora_a, lora_b, scale, adapter_index, output[1])
    ctx.scaling = scaling


def _autograd_backward(ctx, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs = tuple(ctx.needs_input_grad[i] for i in (0, 4, 5))
    grads = _lora_linear_backward(grad_output, *ctx.saved_tensors, ctx.scaling, *needs)
    grad_x, grad_a, grad_b = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return grad_x, None, None, None, grad_a, grad_b, None, None, None


torch.library.register_autograd(
    "visionllm::lora_linear", _autograd_backward, setup_context=_setup_context, lib=_library
)


def _no_second_derivative(ctx, *grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("lora_linear_backward: second derivatives are not implemented")


torch.library.register_autograd("visionllm::lora_linear_backward", _no_second_derivative, lib=_library)

_lora_linear_backward = past_dispatcher("lora_linear_backward", _backward_cpu)
_lora_linear = past_dispatcher("lora_linear", _forward_cpu, _setup_context, _autograd_backward)
