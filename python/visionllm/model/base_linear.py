"""A linear layer of the LLM's base: trained in fp32, or frozen in fp16, bf16 or int8; adapters beside it.

    y[t] = x[t] Wᵀ + b + s_a·(x[t] A_aᵀ) B_aᵀ        with a the adapter of row t, or none

int8 is symmetric and by row: W[n] = weight_scale[n] · weight[n], weight_scale[n] = max |W[n]| / 127. Adapters
are Hu et al.'s (LoRA, 2106.09685). Products are in the base's type, or with int8 in x's (autocast's).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm import _core
from visionllm.model.linear import Linear, PackedLinear, finish
from visionllm.ops import lora_linear
from visionllm.ops.choice import autocast, uses_operators
from visionllm.ops.lora_linear_reference import MAX_RANK

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
FEW_ROWS = 64
OWN = 0  # a row's number for the layer's own adapter; loaded ones follow
NONE = -1  # for the base alone


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] → int8 [N, K] and scales, fp32 [N]; a row of zeros has scale 1."""
    weight = weight.float()
    largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight))
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


class BaseLinear(Linear):
    """Linear layer without an adapter of its own; others can be added (`add`) and chosen for each sample.

    Args:
        dtype: float32; or bfloat16, float16 or int8 for weights that are never trained.

    Attributes:
        added_a, added_b, added_scale: [E, R, K], [E, N, R] and fp32 [E] of the added adapters, smaller ranks
            filled up with zeros; None: there are none here. No part of the state dict.
    """

    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None
    added_a: Tensor | None
    added_b: Tensor | None
    added_scale: Tensor | None

    def __init__(
        self, inputs: int, outputs: int, bias: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        if dtype == torch.float32:
            super().__init__(inputs, outputs, bias=bias)
        else:
            nn.Module.__init__(self)  # torch's own makes its weight with a gradient, which int8 cannot have
            self.in_features, self.out_features = inputs, outputs
            self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype), requires_grad=False)
            self.register_parameter("bias", None)
            if bias:
                wide = torch.float32 if dtype == torch.int8 else dtype
                self.bias = nn.Parameter(torch.zeros(outputs, dtype=wide), requires_grad=False)
            if dtype == torch.int8:
                scale = torch.full((outputs,), inputs**-0.5 / 127)
                self.weight_scale = nn.Parameter(scale, requires_grad=False)
                self.weight.data.random_(-127, 128)
            else:
                nn.init.uniform_(self.weight, -(inputs**-0.5), inputs**-0.5)
            self._packed = PackedLinear(self)
        self.frozen = dtype != torch.float32
        for name in ("lora_a", "lora_b"):  # its own adapter's, which only `LoRALinear` has
            self.register_parameter(name, None)
        self.scale, self.dropout = 1.0, 0.0
        for name in ("added_a", "added_b", "added_scale"):
            self.register_buffer(name, None, persistent=False)
        self._merged = False
        self._original: Tensor | None = None  # the weight before `merge`

    @property
    def int8(self) -> bool:
        return self.weight.dtype == torch.int8

    def entering(self, x: Tensor) -> Tensor:
        """x in the type that a frozen base multiplies in; several layers may share what this returns."""
        if not self.frozen:
            return x
        return autocast(x) if self.int8 else x.to(self.weight.dtype)

    def forward(
        self, x: Tensor, activation: str = "", shortcut: Tensor | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        """chosen: int64 [B], an adapter's number (OWN, or 1 + its place among the added), or NONE, for each
        sample of x [B, …, K]; None: the layer's own, if it has one."""
        if chosen is None:
            adapted = self.lora_a is not None and not self._merged
        else:
            adapted = self.lora_a is not None or self.added_a is not None
        if not self.frozen:
            if not adapted:
                return super().forward(x, activation, shortcut)
            return finish(self.adapted(x, chosen), activation, shortcut)
        # Autocast would copy weights of another type than its own.
        with _without_autocast(x) if not self.int8 else nullcontext():
            x = self.entering(x)
            y = self.adapted(x, chosen) if adapted else self.product(x)
        # Autocast knows no mixture of bf16 and fp16.
        return finish(autocast(y), activation, shortcut)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ + b, the base alone."""
        if not self.frozen:
            return super().forward(x)
        # By torch without packed weights, which would hold them twice.
        y = frozen_product(x, self.weight, self.weight_scale if self.int8 else None)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def adapted(self, x: Tensor, chosen: Tensor | None) -> Tensor:
        a, b, scale, index = self.low_rank(x, chosen)
        if self.frozen:
            a, b = a.to(x.dtype), b.to(x.dtype)
        dropout = self.dropout if self.training and chosen is None else 0.0
        if uses_operators(x) and not dropout and a.shape[-2] <= MAX_RANK:
            bias = None if self.bias is None else self.bias.detach()
            if self.int8:
                bias = None if bias is None else bias.to(x.dtype)
                return lora_linear(x, self.weight, bias, a, b, scale, index, self.weight_scale)
            y = lora_linear(x, self.weight.detach(), bias, a, b, scale, index)
            if torch.is_grad_enabled() and self.weight.requires_grad:
                y = _BaseGradient.apply(y, x, self.weight, self.bias)
            return y
        return self.product(x) + low_rank_term(F.dropout(x, dropout) if dropout else x, a, b, scale, index)

    def low_rank(
        self, x: Tensor, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor, float | Tensor, Tensor | None]:
        """A, B, their scale and the adapter of every row, as `lora_linear` takes them."""
        if chosen is None:
            assert self.lora_a is not None and self.lora_b is not None
            return self.lora_a, self.lora_b, self.scale, None
        index = chosen.view(-1, *[1] * (x.ndim - 2)).expand(x.shape[:-1])
        if self.added_a is None or self.added_b is None or self.added_scale is None:
            assert self.lora_a is not None and self.lora_b is not None
            return self.lora_a[None], self.lora_b[None], self.added_scale_of_own(x), index
        if self.lora_a is None or self.lora_b is None:
            return self.added_a, self.added_b, self.added_scale, index - 1
        rank = max(len(self.lora_a), self.added_a.shape[1])
        a = [_to_rank(t, rank, 1) for t in (self.lora_a.to(self.added_a.dtype)[None], self.added_a)]
        b = [_to_rank(t, rank, 2) for t in (self.lora_b.to(self.added_b.dtype)[None], self.added_b)]
        return torch.cat(a), torch.cat(b), torch.cat([self.added_scale_of_own(x), self.added_scale]), index

    def added_scale_of_own(self, x: Tensor) -> Tensor:
        return torch.full((1,), self.scale, device=x.device)

    # ---- adapters ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, place: int, a: Tensor | None, b: Tensor | None, scale: float = 1.0) -> None:
        """Adds A [R, K] and B [N, R] as adapter number 1 + place; None: it leaves this layer alone."""
        dtype = self.weight.dtype if self.frozen and not self.int8 else torch.float32
        k, n, device = self.in_features, self.out_features, self.weight.device
        if a is None or b is None:
            if self.added_a is None:
                return
            a, b = torch.zeros(1, k), torch.zeros(n, 1)
        if self.added_a is None or self.added_b is None or self.added_scale is None:
            # Those before it have nothing here.
            self.added_a = torch.zeros(place, len(a), k, dtype=dtype, device=device)
            self.added_b = torch.zeros(place, n, len(a), dtype=dtype, device=device)
            self.added_scale = torch.ones(place, device=device)
        rank = max(len(a), self.added_a.shape[1])
        new_a, new_b = a[None].to(device, dtype), b[None].to(device, dtype)
        self.added_a = torch.cat([_to_rank(t, rank, 1) for t in (self.added_a, new_a)])
        self.added_b = torch.cat([_to_rank(t, rank, 2) for t in (self.added_b, new_b)])
        self.added_scale = torch.cat([self.added_scale, self.added_scale.new_tensor([scale])])

    def remove(self, place: int) -> None:
        if self.added_a is None or self.added_b is None or self.added_scale is None:
            return
        kept = [i for i in range(len(self.added_a)) if i != place]
        tensors = [t[kept] if kept else None for t in (self.added_a, self.added_b, self.added_scale)]
        if not kept or not bool((tensors[1] != 0).any()):  # type: ignore[union-attr]
            tensors = [None, None, None]
        self.added_a, self.added_b, self.added_scale = tensors

    @torch.no_grad()
    def merge(self, number: int, keep: bool = True) -> None:
        """Adds an adapter to the weight, computed in fp32; without keep the weight that was is forgotten."""
        if self.int8:
            raise ValueError("merge: the base must be of floating point, got int8 rows")
        self._merged = True
        a: Tensor | None = self.lora_a
        b: Tensor | None = self.lora_b
        scale = self.scale
        if number != OWN:
            a = None if self.added_a is None else self.added_a[number - 1]
            b = None if self.added_b is None else self.added_b[number - 1]
            scale = 1.0 if self.added_scale is None else float(self.added_scale[number - 1])
        if a is None or b is None:
            return
        if keep:
            self._original = self.weight.detach().clone()
        self.weight.copy_(self.weight.float() + scale * (b.float() @ a.float()))

    @torch.no_grad()
    def unmerge(self) -> None:
        if self._original is not None:
            self.weight.copy_(self._original)
        self._merged, self._original = False, None

    def train(self, mode: bool = True) -> BaseLinear:
        if mode and self._merged:
            raise ValueError("train: an adapter is merged into the base; unmerge it first")
        return super().train(mode)  # type: ignore[return-value]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merged and self.lora_b is not None:  # else whoever loads it would add the adapter again
            destination[prefix + "lora_b"] = torch.zeros_like(self.lora_b)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if self._merged:
            raise ValueError(f"load_state_dict: an adapter is merged into {prefix}weight; unmerge it first")
        weight = state_dict.get(prefix + "weight")
        if self.int8 and isinstance(weight, Tensor) and weight.is_floating_point():
            rows, scale = quantise_rows(weight)
            state_dict = {**state_dict, prefix + "weight": rows, prefix + "weight_scale": scale}
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _to_rank(low_rank: Tensor, rank: int, dimension: int) -> Tensor:
    """Filled up with zeros to a rank, which stands in a dimension."""
    missing = rank - low_rank.shape[dimension]
    padding = (0, 0, 0, missing) if dimension == 1 else (0, missing)
    return F.pad(low_rank, padding) if missing else low_rank


def low_rank_term(x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, index: Tensor | None) -> Tensor:
    """The adapters' part in plain torch: arguments as of `visionllm.ops.lora_linear`."""
    if index is None:
        return F.linear(F.linear(x, a), b) * scale
    total: Tensor | None = None
    for i in range(len(a)):
        factor = scale[i] if isinstance(scale, Tensor) else scale
        mine = F.linear(F.linear(x, a[i].to(x.dtype)), b[i].to(x.dtype))
        mine = mine * factor.to(mine.dtype) if isinstance(factor, Tensor) else mine * factor
        total = torch.where((index == i)[..., None], mine, 0.0 if total is None else total)
    assert total is not None
    return total


def _without_autocast(x: Tensor) -> Any:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def frozen_product(x: Tensor, weight: Tensor, weight_scale: Tensor | None = None) -> Tensor:
    """x Wᵀ, differentiable in x, of which nothing is kept: x [..., K], W [N, K] of x's type, or int8 rows."""
    if uses_operators(x) and (weight_scale is not None or _kernel_is_faster(x)):
        x = autocast(x) if weight_scale is not None else x
        if torch.is_grad_enabled() and x.requires_grad:
            return _KernelProduct.apply(x, weight, weight_scale)
        return lora_linear(x, weight, weight_scale=weight_scale)
    if weight_scale is None:
        return F.linear(x, weight)
    return _Int8Product.apply(x, weight, weight_scale)


def _kernel_is_faster(x: Tensor) -> bool:
    """Whether a bf16 or fp16 product is faster by our kernel than by torch's.

    Without instructions for bf16, 500 rows × 4096 × 4096 took 2.4 s of a busy core by torch and 0.28 s by the
    kernel, 256 × 2048 × 2048 a fortieth (AMD EPYC with AVX2). With them they are
    equal (lora_linear.h), but for a few rows.
    """
    if x.device.type != "cpu":
        return False
    few = x.numel() <= FEW_ROWS * x.shape[-1]
    return few or x.dtype == torch.float16 or "avx512_bf16" not in _core.available_isas()


class _KernelProduct(torch.autograd.Function):
    """x Wᵀ by `lora_linear`, which would keep x for adapters that are not there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return lora_linear(x, weight, weight_scale=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        x = rows.new_empty(len(rows), weight.shape[1])  # its shape and type alone are read
        low_rank = rows.new_empty(len(rows), 0, dtype=torch.float32)
        grad_x, _, _ = torch.ops.visionllm.lora_linear_backward(
            rows, x, weight, scale, None, None, None, None, low_rank, 1.0, True, False, False
        )
        return grad_x.view(*grad.shape[:-1], -1), None, None


class _Int8Product(torch.autograd.Function):
    """x Wᵀ of int8 rows in plain torch: W in x's type lives only while it is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _dequantised(weight, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        return grad @ _dequantised(weight, scale, grad.dtype), None, None


def _dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight.to(torch.promote_types(dtype, torch.float32)) * scale[:, None]).to(dtype)


class _BaseGradient(torch.autograd.Function):
    """y as it is; its gradient also goes to the base, which the operator takes as frozen."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bias = None if bias is None or not bias.requires_grad else bias.dtype
        ctx.weight = weight.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        weight = (rows.T @ x.flatten(0, -2).to(rows.dtype)).to(ctx.weight)
        bias = None if ctx.bias is None else rows.sum(0).to(ctx.bias)
        return grad, None, weight, bias
