"""Weights in the order that oneDNN wants them in, for layers that need no gradient, on a CPU.

torch.nn.functional reorders weights at every call, and ReLU6, GELU or a shortcut after it are passes over
memory of their own. oneDNN's operators that torch.compile uses take weights that were reordered once, and do
what follows on the way (model/convolution.py and model/linear.py say what it saves).
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
from torch import Tensor, nn

from visionllm.ops.choice import chosen


@functools.cache
def _has_onednn() -> bool:
    names = (
        "_convolution_pointwise",
        "_reorder_convolution_weight",
        "_linear_pointwise",
        "_reorder_linear_weight",
    )
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
    )


@functools.cache
def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def can_pack(x: Tensor) -> bool:
    """Whether products of x may run here: float32 or bfloat16 on a CPU, nothing to differentiate."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return (
        x.device.type == "cpu"
        and type(x) is Tensor  # a fake one has no memory
        and not torch.is_grad_enabled()
        and chosen() != "reference"
        and _has_onednn()
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and _has_bfloat16()))
        and not torch.compiler.is_compiling()
    )


class PackedWeights:
    """The reordered weights of one module. They belong to it, but to no copy or state dict of it.

    They are made anew when the module's own weights change, and for what `pack` goes by; the last `FORMS` of
    these stay.
    """

    FORMS = 1

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self._own: tuple[Any, ...] = ()
        self._forms: dict[Any, tuple[Tensor, Tensor | None]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeights:
        return type(self)(memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module,)

    def own(self) -> list[Tensor]:
        """The module's tensors that decide the weight and the bias."""
        return [t for t in (self.module.weight, self.module.bias) if t is not None]

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias in this type, the bias a copy."""
        bias = self.module.bias
        weight = self.module.weight.detach().to(dtype)
        return weight, None if bias is None else bias.detach().to(dtype, copy=True)

    def pack(self, weight: Tensor, *how: Any) -> Tensor:
        raise NotImplementedError

    def packed(self, dtype: torch.dtype, *how: Any) -> tuple[Tensor, Tensor | None]:
        """The weight as `pack` orders it, and the bias, in this type."""
        own = tuple((t.data_ptr(), t._version) for t in self.own())
        if own != self._own:
            self._own, self._forms = own, {}
        found = self._forms.pop((dtype, how), None)
        if found is None:
            weight, bias = self.plain(dtype)
            found = self.pack(weight, *how), bias
            while len(self._forms) >= self.FORMS:
                del self._forms[next(iter(self._forms))]
        self._forms[dtype, how] = found  # the last one used is the last to go
        return found
