"""Convolution with ReLU6 or a shortcut as part of it, and its form for prediction on a CPU.

By torch.nn.functional, one picture's 1×1 convolutions on one thread go through im2col, ReLU6 and the shortcut
are passes over memory of their own, and weights are reordered at every call. oneDNN's operators that
torch.compile uses take weights that were reordered once, and do what follows on the way. One core of an
AVX-512 machine took 22.8 ms for the trunk of a picture of 224 × 224 pixels the first way, and 17.2 ms this
way; in bfloat16 16.4 and 11.1 ms.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.ops.choice import autocast, chosen


@functools.cache
def _has_onednn() -> bool:
    names = ("_convolution_pointwise", "_reorder_convolution_weight")
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
    )


@functools.cache
def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


Edges = tuple[int, int, int, int]  # left, right, top, bottom, in pixels


def can_pack(x: Tensor) -> bool:
    """Whether convolutions of x may run here: float32 or bfloat16 on a CPU, nothing to differentiate."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and chosen() != "reference"
        and _has_onednn()
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and _has_bfloat16()))
        and not torch.compiler.is_compiling()
    )


class Convolution(nn.Conv2d):
    """torch's, with ReLU6 or a shortcut's addition as part of it; both are fused where nothing is trained."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._packed = PackedConvolution(self)

    def edges(self, x: Tensor) -> Edges:
        """How far x [B, C, H, W] is padded."""
        height, width = (int(p) for p in self.padding)
        return width, width, height, height

    def forward(self, x: Tensor, relu6: bool = False, shortcut: Tensor | None = None) -> Tensor:
        if can_pack(x):
            return self._packed(x, self.edges(x), relu6, shortcut)
        y = self.convolve(x, self.edges(x))
        if relu6:
            y = F.relu6(y)
        return y if shortcut is None else shortcut + y

    def convolve(self, x: Tensor, edges: Edges) -> Tensor:
        left, right, top, bottom = edges
        if left == right and top == bottom:
            return F.conv2d(x, self.weight, self.bias, self.stride, (top, left), 1, self.groups)
        return F.conv2d(F.pad(x, edges), self.weight, self.bias, self.stride, 0, 1, self.groups)


class PackedConvolution:
    """The reordered weights of one convolution. It belongs to its module but to no copy or state dict of it.

    They are made anew when the module's own weights, the input's shape or its type change.
    """

    def __init__(self, module: nn.Conv2d) -> None:
        self.module = module
        self._key: tuple[Any, ...] = ()
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedConvolution:
        return PackedConvolution(memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedConvolution, (self.module,)

    def __call__(self, x: Tensor, edges: Edges, relu6: bool, shortcut: Tensor | None) -> Tensor:
        x = autocast(x)
        left, right, top, bottom = edges
        grown = 0
        if left == right and top == bottom:
            pad = (top, left)
        elif self.module.groups > 1 and right - left == 1 == bottom - top:
            # A first row and column of zeros in the kernel: cheaper than a padded copy of a wide feature map.
            grown, pad = 1, (bottom, right)
        else:
            x, pad = F.pad(x, edges), (0, 0)
        weight, bias = self._packed(x, pad, grown)
        stride, groups = self.module.stride, self.module.groups
        if shortcut is not None:
            return torch.ops.mkldnn._convolution_pointwise.binary(
                x, shortcut.to(x.dtype), weight, bias, pad, stride, (1, 1), groups, "add", 1.0, None, [], None
            )
        activation, limits = ("hardtanh", [0.0, 6.0]) if relu6 else ("none", [])
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, pad, stride, (1, 1), groups, activation, limits, ""
        )

    def _packed(self, x: Tensor, pad: tuple[int, int], grown: int) -> tuple[Tensor, Tensor | None]:
        module = self.module
        own = [t for t in (module.weight, module.bias) if t is not None]
        key = (x.dtype, x.shape, pad, *((t.data_ptr(), t._version) for t in own))
        if self._key != key or self._weight is None:
            weight = module.weight.detach().to(x.dtype)
            if grown:
                weight = F.pad(weight, (1, 0, 1, 0))
            self._weight = torch.ops.mkldnn._reorder_convolution_weight(
                weight, pad, module.stride, (1, 1), module.groups, list(x.shape)
            )
            self._bias = None if module.bias is None else module.bias.detach().to(x.dtype, copy=True)
            self._key = key
        return self._weight, self._bias
