"""Language fusion as a torch operator (VisionLLM, Wang et al., NeurIPS 2023, section 3.3).

    output = x + gate * (attention(LN(x) W_q^T + b_q, key, value) W_o^T + b_o)

Every position of every scale looks at the text's tokens, all scales in one call. The contract, with the
meaning of the shape letters, is in ``cpp/include/visionllm/fusion_attention.h``. On the CPU and on CUDA the
operator runs the compiled kernels; on other devices (with a warning), and in float64, the PyTorch reference
below.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionllm import _core
from visionllm.ops import fallback, native

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
    return torch.ops.visionllm.fusion_attention(
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


def fusion_attention_reference(
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
    """The formula in plain PyTorch, in the tensors' own precision, on any device.

    Every other implementation is held against this one in float64. Needs memory for [B, H, N, T] scores.

    Raises:
        ValueError: a shape or type does not fit, with the compiled operator's message.
    """
    vectors = dict(
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        query_bias=query_bias,
        output_bias=output_bias,
        gate=gate,
    )
    matrices = dict(query_weight=query_weight, output_weight=output_weight)
    _check_arguments("fusion_attention", x, key, value, mask, vectors, matrices)
    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, epsilon)
    query = F.linear(normed, query_weight, query_bias).view(x.shape[:2] + key.shape[2:])
    attended = _attend(query, key, value, mask)[1]
    return (x + gate * F.linear(attended.flatten(2), output_weight, output_bias)).contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, H, N, T], which are 0 where there is no text, and what they gather [B, N, H, D]."""
    keep = mask.bool()
    # Selected, not multiplied by zero: NaN where there is no text stays there.
    key = key.masked_fill(~keep[..., None, None], 0.0)
    value = value.masked_fill(~keep[..., None, None], 0.0)
    scores = torch.einsum("bnhd,bthd->bhnt", query * query.shape[-1] ** -0.5, key)
    keep = keep[:, None, None]
    # The least finite number, not -inf, whose softmax over nothing else is NaN.
    weights = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~keep, 0.0)
    return weights, torch.einsum("bhnt,bthd->bnhd", weights, value)


def _check_arguments(
    operator: str,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    vectors: dict[str, Tensor],
    matrices: dict[str, Tensor],
) -> None:
    """What ``cpp/fusion_attention.cpp`` checks for the kernels, their limits apart."""
    fallback.check_rank(operator, "x", x, "[B, N, C]")
    fallback.check_rank(operator, "key", key, "[B, T, H, D]")
    if not x.is_floating_point():
        raise ValueError(
            f"{operator}: x must be float32, bfloat16 or float16, got {str(x.dtype).removeprefix('torch.')}"
        )
    batch, _, channels = x.shape
    _, tokens, heads, width = key.shape
    if heads * width != channels:
        raise ValueError(
            f"{operator}: key must have H * D = C = {channels} channels, got {heads} heads of {width}"
        )
    keys = (batch, tokens, heads, width)
    fallback.check_shape(operator, "key", key, "[B, T, H, D]", keys)
    fallback.check_shape(operator, "value", value, "[B, T, H, D]", keys)
    fallback.check_shape(operator, "mask", mask, "[B, T]", keys[:2])
    for name, tensor in vectors.items():
        fallback.check_shape(operator, name, tensor, "[C]", (channels,))
    for name, tensor in matrices.items():
        fallback.check_shape(operator, name, tensor, "[C, C]", (channels, channels))
    for name, tensor in (dict(key=key, value=value) | vectors | matrices).items():
        if tensor.dtype != x.dtype:
            raise ValueError(
                f"{operator}: {name} must be {str(x.dtype).removeprefix('torch.')}, got "
                f"{str(tensor.dtype).removeprefix('torch.')}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{operator}: {name} must be on x's device {x.device}, got {tensor.device}")
    if mask.dtype not in (torch.bool, torch.uint8):
        raise ValueError(
            f"{operator}: mask must be uint8 or boolean, got {str(mask.dtype).removeprefix('torch.')}"
        )
    if mask.device != x.device:
        raise ValueError(f"{operator}: mask must be on x's device {x.device}, got {mask.device}")


def fusion_attention_backward_reference(
    grad_output: Tensor,
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
) -> tuple[Tensor, ...]:
    """Gradients of all tensors but the mask, in order, in plain PyTorch and the tensors' own precision.

    Raises:
        ValueError: as ``fusion_attention_reference``.
    """
    vectors = dict(
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        query_bias=query_bias,
        output_bias=output_bias,
        gate=gate,
    )
    matrices = dict(query_weight=query_weight, output_weight=output_weight)
    operator = "fusion_attention_backward"
    _check_arguments(operator, x, key, value, mask, vectors, matrices)
    fallback.check_shape(operator, "grad_output", grad_output, "[B, N, C]", x.shape)
    scale = key.shape[-1] ** -0.5
    centred = x - x.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    unit = centred * inverse  # [B, N, C], mean 0 and variance 1
    normed = unit * norm_weight + norm_bias
    query = F.linear(normed, query_weight, query_bias).view(x.shape[:2] + key.shape[2:])
    weights, attended = _attend(query, key, value, mask)
    flat = attended.flatten(2)  # [B, N, C]
    grad_gate = (grad_output * F.linear(flat, output_weight, output_bias)).sum((0, 1))
    gated = grad_output * gate
    grad_output_weight = torch.einsum("bni,bnj->ij", gated, flat)
    grad_attended = (gated @ output_weight).view(attended.shape)

    keep = mask.bool()[..., None, None]
    kept_key, kept_value = key.masked_fill(~keep, 0.0), value.masked_fill(~keep, 0.0)
    grad_value = torch.einsum("bhnt,bnhd->bthd", weights, grad_attended)
    grad_weights = torch.einsum("bnhd,bthd->bhnt", grad_attended, kept_value)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    grad_key = torch.einsum("bhnt,bnhd->bthd", grad_scores, query) * scale
    grad_query = (torch.einsum("bhnt,bthd->bnhd", grad_scores, kept_key) * scale).flatten(2)

    grad_normed = grad_query @ query_weight
    grad_unit = grad_normed * norm_weight
    grad_centred = (
        grad_unit - grad_unit.mean(-1, keepdim=True) - unit * (grad_unit * unit).mean(-1, keepdim=True)
    )
    grads = (
        grad_output + grad_centred * inverse,
        (grad_normed * unit).sum((0, 1)),
        grad_normed.sum((0, 1)),
        torch.einsum("bni,bnj->ij", grad_query, normed),
        grad_query.sum((0, 1)),
        grad_key,
        grad_value,
        grad_output_weight,
        gated.sum((0, 1)),
        grad_gate,
    )
    return tuple(grad.contiguous() for grad in grads)


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
    """The core refuses types that do not fit each other; what it has no name for, the reference refuses."""
    return all(t.dtype in _KERNEL_TYPES for i, t in enumerate(arguments[:11]) if i != 7)


def _forward_cpu(*arguments: Any) -> Tensor:
    if _has_cpu_kernel(arguments):
        return _forward_kernel(*arguments)
    return fusion_attention_reference(*arguments)


def _backward_cpu(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    if _has_cpu_kernel(arguments):
        return _backward_kernel(grad_output, arguments, with_workspace=False)
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
    grads = torch.ops.visionllm.fusion_attention_backward(grad_output, *ctx.saved_tensors, ctx.epsilon)
    return (*grads[:7], None, *grads[7:], None)


torch.library.register_autograd(
    "visionllm::fusion_attention", _autograd_backward, setup_context=_setup_context, lib=_library
)


def _no_second_derivative(ctx, *grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("fusion_attention_backward: second derivatives are not implemented")


torch.library.register_autograd("visionllm::fusion_attention_backward", _no_second_derivative, lib=_library)
