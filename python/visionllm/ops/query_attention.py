"""Batched query decoding: groups of slots attend to one shared prefix and causally to their own group.

    q', k' = RoPE(q), RoPE(k)                    slot j of every group has position prefix_length + j
    output[b, m, s] = softmax(q'[b, m, s] · K / √D) V, where K, V are the prefix's first prefix_length tokens
                      and the slots 0 … s of group m

The contract, with the meaning of the shape letters, is in ``cpp/include/visionllm/query_attention.h``. The
operator runs the compiled kernels, on the CPU and on CUDA; in float64, on the CPU for sizes beyond the
kernels' limits, and where a build has no CUDA kernels, the PyTorch reference in
``query_attention_reference.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import visionllm._core as _core
from visionllm.ops import fallback, native
from visionllm.ops.direct import past_dispatcher
from visionllm.ops.query_attention_reference import (
    check_arguments,
    forward_reference,
    query_attention_backward_reference,
    query_attention_reference,
)

__all__ = ["SampleInputs", "query_attention", "query_attention_reference", "sample_inputs"]


def query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_length: Tensor,
    rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of M groups of S slots; differentiable in q, k, v, prefix_k and prefix_v.

    Args:
        q: [B, M, S, H, D], not rotated.
        k, v: [B, M, S, Hkv, D], k not rotated; H is a multiple of Hkv, and query head h uses KV head
            h // (H // Hkv).
        prefix_k, prefix_v: [B, P, Hkv, D], prefix_k rotated already; P may be 0.
        prefix_length: [B] int64 (other integers are converted), how many prefix tokens are real; they stand
            first, and what stands behind them is not read. From 0 to P; the kernels clamp what is not.
        rope: cosine and sine tables, [positions, D / 2] with positions >= P + S, row i for position i, best
            in float32; the halves of a head are rotated against each other. None: no rotation.

    Returns:
        [B, M, S, H, D] of q's type. Forward and backward are deterministic.

    The kernels take S <= 64, P <= 8192 and D a multiple of 8 up to 128 (on the CPU other sizes run the
    reference); views of one projection of q, k and v are not copied.

    Raises:
        ValueError: a shape or type does not fit; the message names it.
    """
    cosine, sine = rope if rope is not None else (None, None)
    return _query_attention(q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine)[0]


def rope_table(positions: int, channels: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position · theta^(-2i / channels): two [positions, channels / 2] in float32."""
    frequency = theta ** (-torch.arange(0, channels, 2).float() / channels)
    angles = torch.arange(positions).float()[:, None] * frequency
    return angles.cos(), angles.sin()


@dataclass(frozen=True)
class SampleInputs:
    """Arguments of ``query_attention`` in order; the tests, opcheck and the bench take theirs from here."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    prefix_length: Tensor
    rope: tuple[Tensor, Tensor] | None

    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        return self.q, self.k, self.v, self.prefix_k, self.prefix_v, self.prefix_length, self.rope

    def operator_args(self) -> tuple[Tensor | None, ...]:
        """As ``torch.ops.visionllm.query_attention`` takes them."""
        return *self.args()[:6], *(self.rope if self.rope is not None else (None, None))


def sample_inputs(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    groups: int = 7,
    slots: int = 5,
    heads: int = 4,
    kv_heads: int = 2,
    channels: int = 16,
    prefix: int = 11,
    lengths: tuple[int, ...] = (11, 4),
    rope: bool = True,
    one_projection: bool = False,
    requires_grad: bool = False,
    seed: int = 0,
) -> SampleInputs:
    """Random inputs for a batch of ``lengths``; behind a prefix's end stands NaN, which nobody may read.

    With ``one_projection`` q, k and v are views of one tensor [B, M, S, (H + 2 Hkv) · D].
    """
    random = torch.Generator().manual_seed(seed)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    batch = len(lengths)
    joint = torch.randn(
        batch, groups, slots, heads + 2 * kv_heads, channels, generator=random, dtype=real
    ).to(device, dtype)
    q, k, v = joint.split([heads, kv_heads, kv_heads], 3)
    if not one_projection:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    length = torch.tensor(lengths, dtype=torch.int64)
    padding = torch.arange(prefix) >= length[:, None]
    prefix_k, prefix_v = (
        torch.randn(batch, prefix, kv_heads, channels, generator=random, dtype=real).to(dtype)
        for _ in range(2)
    )
    prefix_k[padding] = prefix_v[padding] = math.nan
    tensors = (q, k, v, prefix_k.to(device), prefix_v.to(device))
    q, k, v, prefix_k, prefix_v = (t.detach().requires_grad_(requires_grad) for t in tensors)
    table = None
    if rope:
        cosine, sine = rope_table(prefix + slots, channels)
        table = (cosine.to(device, real), sine.to(device, real))
    return SampleInputs(q, k, v, prefix_k, prefix_v, length.to(device), table)


# ---- registration ---------------------------------------------------------------------------------------

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor prefix_length, "
    "Tensor? cosine, Tensor? sine"
)
_library = torch.library.Library("visionllm", "FRAGMENT")
_library.define(f"query_attention({_INPUTS}) -> (Tensor, Tensor)")
_library.define(
    f"query_attention_backward(Tensor grad_output, Tensor output, Tensor logsumexp, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor itself where the kernels can read it in 16-byte pieces, else a contiguous copy."""
    piece = 16 // tensor.element_size()
    if tensor.data_ptr() % 16 == 0:
        if tensor.shape[-1] % piece == 0 and tensor.is_contiguous():
            return tensor
        if tensor.stride(-1) == 1 and all(stride % piece == 0 for stride in tensor.stride()[:-1]):
            return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _kernel_arguments(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_length: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The tensors as the kernels want them; copies only what does not fit already.

    The core checks all arguments; here what must hold before they can be taken apart, and what is converted.
    """
    as_they_are = (
        q.is_cpu
        and q.dim() == k.dim() == v.dim() == 5
        and prefix_k.dim() == prefix_v.dim() == 4
        and prefix_length.dtype == torch.int64
    )
    if cosine is not None and sine is not None:
        as_they_are &= cosine.dtype == sine.dtype == torch.float32 and cosine.shape == sine.shape
    if not as_they_are:
        check_arguments(operator, q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine)
        prefix_length = prefix_length.to(q.device, torch.int64)
        cosine, sine = (None if t is None else t.float() for t in (cosine, sine))
    return (
        _aligned(q),
        _aligned(k),
        _aligned(v),
        _aligned(prefix_k),
        _aligned(prefix_v),
        prefix_length.contiguous(),
        None if cosine is None else _aligned(cosine.contiguous()),
        None if sine is None else _aligned(sine.contiguous()),
    )


def _call(operator: str, outputs: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...]) -> None:
    """Runs the kernel. What the core has no name for, such as float64 beside float32, is worded here."""
    try:
        native.call(operator, *outputs, *inputs)
    except ValueError:
        check_arguments(operator, *inputs[-8:])  # type: ignore[arg-type]
        raise


def _fits_kernels(q: Tensor, prefix_k: Tensor) -> bool:
    """Whether the kernels take a tensor of q's type and sizes, and a prefix of that length."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if q.dim() != 5 or prefix_k.dim() != 4:
        return True  # the check of arguments says what is wrong
    slots, channels = q.shape[2], q.shape[4]
    return slots <= 64 and 8 <= channels <= 128 and channels % 8 == 0 and prefix_k.shape[1] <= 8192


def _forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_length: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
) -> tuple[Tensor, Tensor]:
    inputs = (q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine)
    if not _fits_kernels(q, prefix_k):
        return forward_reference(*inputs)
    return _forward_kernel(*inputs, splits=1)


def _backward_cpu(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_length: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (grad_output, output, logsumexp, q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine)
    if not _fits_kernels(q, prefix_k):
        return query_attention_backward_reference(*inputs)
    return _backward_kernel(*inputs)


def _forward_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_length: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``splits``: into how many parts the keys are divided among blocks; by default what fits the sizes."""
    inputs = (q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine)
    if q.dtype == torch.float64:
        return forward_reference(*inputs)
    arguments = _kernel_arguments("query_attention", *inputs)
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    logsumexp = q.new_empty(q.shape[:4], dtype=torch.float32)
    if splits is None:
        splits = _core.query_attention_splits(*q.shape[:4], k.shape[3], prefix_k.shape[1])
    workspace = None
    if splits > 1:
        workspace = q.new_empty((splits, logsumexp.numel() * (q.shape[4] + 1)), dtype=torch.float32)
    _call("query_attention", (output, logsumexp, workspace), arguments)
    return output, logsumexp


def _backward_kernel(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_length: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine)
    if q.dtype == torch.float64:
        return query_attention_backward_reference(grad_output, output, logsumexp, *inputs)
    operator = "query_attention_backward"
    arguments = _kernel_arguments(operator, *inputs)
    fallback.check_shape(operator, "grad_output", grad_output, "[B, M, S, H, D]", q.shape)
    grad_q, grad_k, grad_v, grad_prefix_k, grad_prefix_v = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, prefix_k, prefix_v)
    )
    gradients = (grad_q, grad_k, grad_v, grad_prefix_k, grad_prefix_v)
    workspace = torch.empty_like(logsumexp)
    outputs = (*gradients, workspace, _aligned(grad_output), output, logsumexp)
    _call(operator, outputs, arguments)
    return gradients


def _forward_elsewhere(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_length: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Devices that this build has no kernels for."""
    inputs = (q, k, v, prefix_k, prefix_v, prefix_length, cosine, sine)
    results = forward_reference(*inputs)
    fallback.warn_of_reference("query_attention", q.device.type)
    return results


for _key, _forward, _backward in (
    ("CPU", _forward_cpu, _backward_cpu),
    ("CompositeExplicitAutograd", _forward_elsewhere, query_attention_backward_reference),
):
    _library.impl("query_attention", _forward, _key)
    _library.impl("query_attention_backward", _backward, _key)
if _core.cuda_architectures:
    _library.impl("query_attention", _forward_kernel, "CUDA")
    _library.impl("query_attention_backward", _backward_kernel, "CUDA")


@torch.library.register_fake("visionllm::query_attention", lib=_library)
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_length: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
) -> tuple[Tensor, Tensor]:
    fallback.check_rank("query_attention", "q", q, "[B, M, S, H, D]")
    precise = torch.promote_types(q.dtype, torch.float32)
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    return output, q.new_empty(q.shape[:4], dtype=precise)


@torch.library.register_fake("visionllm::query_attention_backward", lib=_library)
def _backward_fake(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_length: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v, grad_prefix_k, grad_prefix_v = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, prefix_k, prefix_v)
    )
    return grad_q, grad_k, grad_v, grad_prefix_k, grad_prefix_v


def _setup_context(ctx, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs)
    ctx.mark_non_differentiable(output[1])


def _autograd_backward(ctx, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = _query_attention_backward(grad_output, *ctx.saved_tensors)
    return *grads, None, None, None


torch.library.register_autograd(
    "visionllm::query_attention", _autograd_backward, setup_context=_setup_context, lib=_library
)


def _no_second_derivative(ctx, *grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("query_attention_backward: second derivatives are not implemented")


torch.library.register_autograd("visionllm::query_attention_backward", _no_second_derivative, lib=_library)

_query_attention_backward = past_dispatcher("query_attention_backward", _backward_cpu)
_query_attention = past_dispatcher("query_attention", _forward_cpu, _setup_context, _autograd_backward)
