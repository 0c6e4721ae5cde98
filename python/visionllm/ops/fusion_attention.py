"""Language fusion as a torch operator (VisionLLM, Wang et al., NeurIPS 2023, section 3.3).

    output = x + gate * (attention(LN(x) W_q^T + b_q, key, value) W_o^T + b_o)

Every position of every scale looks at the text's tokens, all scales in one call. The contract, with the
meaning of the shape letters, is in ``cpp/include/visionllm/fusion_attention.h``. On the CPU and on CUDA the
operator runs the compiled kernels; on other devices (with a warning), and in float64, the PyTorch reference
in ``fusion_attention_reference.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from visionllm import _core
from visionllm.ops import fallback, native
from visionllm.ops.direct import past_dispatcher
from visionllm.ops.fusion_attention_reference import (
    fusion_attention_backward_reference,
    fusion_attention_reference,
)

__all__ = ["SampleInputs", "fusion_attention", "fusion_attention_reference", "sample_inputs"]


def fusion_attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    gate: Tensor,
    epsilon: float = 1e-5,
) -> Tensor:
    """Layer norm, query projection, attention over the text, output projection, gated residual in one pass.

    Differentiable in everything but the mask.

    Args:
        x: [B, N, C] float32, bfloat16 or float16 (float64 takes the reference), positions of all scales.
        norm_weight, norm_bias: [C], of the layer norm. These and all tensors below have x's type, but for
            the mask.
        query_weight, query_bias: [C, C] as (outputs, inputs), and [C].
        key, value: [B, T, H, D] with H * D = C, of the text's tokens; may be views of one projection.
        mask: [B, T] bool, True where there is text. What key and value hold elsewhere is not used; where
            there is no text at all, attention gives 0.
        output_weight, output_bias: [C, C] as (outputs, inputs), and [C].
        gate: [C].
        epsilon: added to the variance.

    Returns:
        [B, N, C] of x's type. Forward and backward are deterministic with the compiled kernels.

    Raises:
        ValueError: a shape or type does not fit; the message names it.
        RuntimeError: on CUDA, sizes that the kernels do not take: C above 256 or no multiple of 16, D above
            64 or no multiple of 8, T above 512.
    """
    return _fusion_attention(
        x,
        norm_weight,
        norm_bias,
        query_weight,
        query_bias,
        key,
        value,
        mask,
        output_weight,
        output_bias,
        gate,
        epsilon,
    )


@dataclass(frozen=True)
class SampleInputs:
    """Arguments of ``fusion_attention`` in order; the tests, opcheck and the bench take theirs from here."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    query_weight: Tensor
    query_bias: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    output_weight: Tensor
    output_bias: Tensor
    gate: Tensor
    epsilon: float = 1e-5

    def args(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are for, in the order of the backward's results."""
        return tuple(t for t in self.args() if isinstance(t, Tensor) and t is not self.mask)

    def double(self) -> SampleInputs:
        """The same numbers in float64."""
        args: list[Any] = [t.detach().double() if isinstance(t, Tensor) else t for t in self.args()]
        args[7] = self.mask
        return SampleInputs(*args)


def sample_inputs(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    positions: int = 37,
    channels: int = 64,
    heads: int = 4,
    tokens: int = 11,
    texts: tuple[int, ...] | None = None,
    one_projection: bool = True,
    requires_grad: bool = False,
    seed: int = 0,
) -> SampleInputs:
    """Random inputs like a trained fusion layer's.

    Args:
        positions, channels, heads, tokens: N, C, H, T.
        texts: how many of the tokens are text, for each batch entry; all but one for each that is not given.
            Where there is none, key and value are NaN.
        one_projection: key and value are views of one [B, T, 2, H, D] projection, else each is contiguous.
    """
    random = torch.Generator().manual_seed(seed)
    real = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(*shape, generator=random, dtype=real)

    x = normal(batch, positions, channels, scale=1.5, mean=0.3)
    vectors = [
        normal(channels, scale=0.2, mean=1.0),  # norm weight
        normal(channels, scale=0.2),  # norm bias
        normal(channels, scale=0.2),  # query bias
        normal(channels, scale=0.2),  # output bias
        normal(channels, scale=0.3, mean=0.5),  # gate
    ]
    matrices = [normal(channels, channels, scale=2 * channels**-0.5) for _ in range(2)]
    projection = normal(batch, tokens, 2, heads, channels // heads)
    lengths = torch.full((batch,), max(tokens - 1, 0))
    for entry, length in enumerate(texts or ()):
        lengths[entry] = length
    mask = torch.arange(tokens) < lengths[:, None]
    projection = projection.masked_fill(~mask[:, :, None, None, None], float("nan"))

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype).requires_grad_(requires_grad)

    key, value = projection.to(device, dtype).unbind(2)
    if not one_projection:
        key, value = key.contiguous(), value.contiguous()
    norm_weight, norm_bias, query_bias, output_bias, gate = (leaf(t) for t in vectors)
    query_weight, output_weight = (leaf(t) for t in matrices)
    return SampleInputs(
        leaf(x),
        norm_weight,
        norm_bias,
        query_weight,
        query_bias,
        key.requires_grad_(requires_grad),
        value.requires_grad_(requires_grad),
        mask.to(device),
        output_weight,
        output_bias,
        gate,
    )


# ---- registration ---------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor query_weight, Tensor query_bias, Tensor key, "
    "Tensor value, Tensor mask, Tensor output_weight, Tensor output_bias, Tensor gate, float epsilon"
)
_library = torch.library.Library("visionllm", "FRAGMENT")
_library.define(f"fusion_attention({_ARGUMENTS}) -> Tensor")
_library.define(
    f"fusion_attention_backward(Tensor grad_output, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes; a copy only if it is not so already."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _aligned_rows(tensor: Tensor) -> Tensor:
    """Every row of the last dimension contiguous and at a multiple of 16 bytes; a copy only if need be."""
    if tensor.dim() == 0 or tensor.stride(-1) != 1 or tensor.data_ptr() % 16:
        return tensor.clone(memory_format=torch.contiguous_format)
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size > 1 and stride * tensor.element_size() % 16:
            return tensor.contiguous()
    return tensor


def _kernel_arguments(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    gate: Tensor,
    epsilon: float,
) -> tuple[Any, ...]:
    """The arguments as the kernels want them. The core checks them."""
    return (
        _aligned(x),
        _aligned(norm_weight),
        _aligned(norm_bias),
        _aligned(query_weight),
        _aligned(query_bias),
        _aligned_rows(key),
        _aligned_rows(value),
        mask.contiguous(),
        _aligned(output_weight),
        _aligned(output_bias),
        _aligned(gate),
        epsilon,
    )


def _forward_kernel(*arguments: Any) -> Tensor:
    kernel_arguments = _kernel_arguments(*arguments)
    output = torch.empty_like(kernel_arguments[0], memory_format=torch.contiguous_format)
    native.call("fusion_attention", output, *kernel_arguments)
    return output


def _backward_kernel(
    grad_output: Tensor, arguments: tuple[Any, ...], with_workspace: bool
) -> tuple[Tensor, ...]:
    kernel_arguments = _kernel_arguments(*arguments)
    x, key = kernel_arguments[0], kernel_arguments[5]
    fallback.check_rank("fusion_attention_backward", "x", x, "[B, N, C]")
    fallback.check_rank("fusion_attention_backward", "key", key, "[B, T, H, D]")
    tensors = [t for i, t in enumerate(kernel_arguments[:11]) if i != 7]  # all but the mask
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)
    size = 0
    if with_workspace:
        size = _core.fusion_attention_backward_workspace_bytes(
            *x.shape, key.shape[1], key.shape[2], x.element_size()
        )
    workspace = x.new_empty(size // 4, dtype=torch.float32)
    native.call("fusion_attention_backward", *grads, workspace, _aligned(grad_output), *kernel_arguments)
    return grads


_KERNEL_TYPES = {torch.float32, torch.bfloat16, torch.float16}


def _has_cpu_kernel(arguments: tuple[Any, ...]) -> bool:
    """Whether the core has a name for all types; it refuses those that do not fit each other."""
    return all(t.dtype in _KERNEL_TYPES for i, t in enumerate(arguments[:11]) if i != 7)


def _forward_cpu(*arguments: Any) -> Tensor:
    if arguments[0].dtype in _KERNEL_TYPES:
        try:
            return _forward_kernel(*arguments)
        except ValueError:
            if _has_cpu_kernel(arguments):
                raise
    return fusion_attention_reference(*arguments)  # which names a type that does not fit


def _backward_cpu(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    if arguments[0].dtype in _KERNEL_TYPES:
        try:
            return _backward_kernel(grad_output, arguments, with_workspace=False)
        except ValueError:
            if _has_cpu_kernel(arguments):
                raise
    return fusion_attention_backward_reference(grad_output, *arguments)


def _forward_cuda(*arguments: Any) -> Tensor:
    return _forward_kernel(*arguments)


def _backward_cuda(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _backward_kernel(grad_output, arguments, with_workspace=True)


def _forward_on_cuda(x: Tensor, *arguments: Any) -> Tensor:
    if native.has_cuda_kernels() and x.dtype != torch.float64:
        return _forward_cuda(x, *arguments)
    return _forward_elsewhere(x, *arguments)


def _backward_on_cuda(grad_output: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    if native.has_cuda_kernels() and x.dtype != torch.float64:
        return _backward_cuda(grad_output, x, *arguments)
    return fusion_attention_backward_reference(grad_output, x, *arguments)


def _forward_elsewhere(x: Tensor, *arguments: Any) -> Tensor:
    """Devices that this build has no kernels for."""
    output = fusion_attention_reference(x, *arguments)
    fallback.warn_of_reference("fusion_attention", x.device.type)
    return output


for _key, _forward, _backward in (
    ("CPU", _forward_cpu, _backward_cpu),
    ("CUDA", _forward_on_cuda, _backward_on_cuda),
    ("CompositeExplicitAutograd", _forward_elsewhere, fusion_attention_backward_reference),
):
    _library.impl("fusion_attention", _forward, _key)
    _library.impl("fusion_attention_backward", _backward, _key)


@torch.library.register_fake("visionllm::fusion_attention", lib=_library)
def _forward_fake(x: Tensor, *_: Any) -> Tensor:
    fallback.check_rank("fusion_attention", "x", x, "[B, N, C]")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("visionllm::fusion_attention_backward", lib=_library)
def _backward_fake(_: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors = [t for i, t in enumerate(arguments[:11]) if i != 7]  # all but the mask
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _setup_context(ctx, inputs: tuple[Tensor | float, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:11])
    ctx.epsilon = inputs[11]


def _autograd_backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grads = _fusion_attention_backward(grad_output, *ctx.saved_tensors, ctx.epsilon)
    return (*grads[:7], None, *grads[7:], None)


torch.library.register_autograd(
    "visionllm::fusion_attention", _autograd_backward, setup_context=_setup_context, lib=_library
)


def _no_second_derivative(ctx, *grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("fusion_attention_backward: second derivatives are not implemented")


torch.library.register_autograd("visionllm::fusion_attention_backward", _no_second_derivative, lib=_library)

_fusion_attention_backward = past_dispatcher("fusion_attention_backward", _backward_cpu)
_fusion_attention = past_dispatcher("fusion_attention", _forward_cpu, _setup_context, _autograd_backward)
