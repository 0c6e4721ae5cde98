"""What each CUDA kernel's design promises of its machine code; bench/cuda_static.py holds the compiler to it.

Every kernel has to match exactly one entry, so that none is forgotten. No entry may excuse spilled registers
without saying why that does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["PROMISES", "Promise", "promise_of"]


@dataclass(frozen=True)
class Promise:
    kernels: (
        str  # regular expression of the whole name, with its template arguments: "low_rank_kernel<fp16.*"
    )
    operator: str
    loads_16: bool = False  # its global loads of bulk data are 16 bytes wide
    tensor: bool = False  # multiplies on tensor cores
    # Bytes a block asks for at launch, at most at the model's sizes; groups of `kernels` are at hand.
    dynamic_shared: int | Callable[[re.Match[str]], int] = 0
    adapts: bool = False  # asks for less where a chip has less
    stack_bytes: int = (
        0  # a thread's stack frame at most, spilled registers included; and why there may be one:
    )
    stack_reason: str = ""

    def dynamic_shared_of(self, kernel: str) -> int:
        match = re.fullmatch(self.kernels, kernel)
        if match is None:
            raise LookupError(f"{kernel} is none of {self.kernels}")
        return self.dynamic_shared(match) if callable(self.dynamic_shared) else self.dynamic_shared

    def broken_by(self, counts: dict[str, int], stack: int) -> list[str]:
        """What of it the machine code does not keep."""
        problems = []
        if self.loads_16 and not counts["loads_16"]:
            problems.append("has no 16-byte global load")
        if self.tensor and not counts["tensor"]:
            problems.append("has no tensor-core instruction")
        if stack > self.stack_bytes or (counts["local"] and not self.stack_reason):
            local = counts["local"]
            problems.append(f"has a stack frame of {stack} bytes a thread, accessed in {local} places")
        return problems


_16 = "(?:bf16|fp16)"
_ANY = "(?:bf16|fp16|fp32)"
_BOOL = "(?:true|false)"

# Dynamic shared memory is that of C = 256 channels in heads of 32, 64 text tokens, 4 levels of 4 points.
PROMISES = (
    # One channel a lane serves head dimensions that are no multiple of a vector.
    Promise(f"ms_deform_attn_kernel<{_ANY}, 1, {_BOOL}>", "ms_deform_attn"),
    Promise(f"ms_deform_attn_kernel<{_ANY}, [48], {_BOOL}>", "ms_deform_attn", loads_16=True),
    Promise(f"ms_deform_attn_backward_kernel<{_ANY}, 1, false>", "ms_deform_attn"),
    Promise(f"ms_deform_attn_backward_kernel<{_ANY}, [48], false>", "ms_deform_attn", loads_16=True),
    Promise(f"ms_deform_attn_backward_kernel<{_ANY}, 1, true>", "ms_deform_attn", dynamic_shared=512),
    Promise(
        f"ms_deform_attn_backward_kernel<{_ANY}, ([48]), true>",
        "ms_deform_attn",
        loads_16=True,
        dynamic_shared=lambda m: 512 * int(m[1]),
    ),
    Promise("reference_gradient_kernel|fill_zero_kernel", "ms_deform_attn"),
    Promise(f"convert_kernel<{_ANY}>", "ms_deform_attn"),
    Promise("(?:bounds|gather)_kernel(?:<.*>)?", "ms_deform_attn"),
    # lora_linear: the stream kernel for few rows, the tiled product for many; float32 multiplies in float32.
    Promise(f"stream_kernel<{_16}, .*, true>", "lora_linear", loads_16=True, tensor=True),
    Promise(f"stream_kernel<{_16}, .*, false>", "lora_linear", tensor=True),
    Promise(
        f"gemm_kernel<{_16}, .*, (64|128)>",
        "lora_linear",
        loads_16=True,
        tensor=True,
        dynamic_shared=lambda m: 4 * (int(m[1]) + 128) * 64 + int(m[1]) * 4,
    ),
    Promise(f"low_rank_kernel<{_16}, .*, true>", "lora_linear", loads_16=True, tensor=True),
    Promise(f"low_rank_kernel<{_16}, .*, false>", "lora_linear", tensor=True),
    Promise(f"outer_kernel<{_16}, true>", "lora_linear", loads_16=True, tensor=True),
    Promise(f"outer_kernel<{_16}, false>", "lora_linear", tensor=True),
    Promise(r"product_kernel<.*>|low_rank_float_kernel|outer_float_kernel", "lora_linear"),
    Promise(f"add_partial_kernel<{_ANY}>", "lora_linear"),
    # fusion_attention: float32 multiplies on tensor cores too, as three TF32 products.
    Promise(
        f"fusion::fusion_attention_kernel<{_16}>",
        "fusion_attention",
        loads_16=True,
        tensor=True,
        dynamic_shared=67856,
    ),
    Promise(
        "fusion::fusion_attention_kernel<fp32>",
        "fusion_attention",
        loads_16=True,
        tensor=True,
        dynamic_shared=68880,
    ),
    Promise(
        f"fusion::fusion_attention_backward_rows_kernel<{_ANY}>",
        "fusion_attention",
        loads_16=True,
        tensor=True,
        dynamic_shared=93200,
    ),
    Promise(
        f"fusion::fusion_attention_backward_keys_kernel<{_16}>",
        "fusion_attention",
        loads_16=True,
        tensor=True,
        dynamic_shared=31744,
    ),
    Promise(
        "fusion::fusion_attention_backward_keys_kernel<fp32>",
        "fusion_attention",
        loads_16=True,
        tensor=True,
        dynamic_shared=41472,
    ),
    Promise(
        f"fusion::fusion_attention_backward_weights_kernel<{_ANY}>",
        "fusion_attention",
        loads_16=True,
        tensor=True,
        dynamic_shared=52224,
    ),
    Promise(f"fusion::fusion_attention_backward_finish_kernel<{_ANY}>", "fusion_attention"),
    # query_attention
    Promise(
        f"query_attention_(?:kernel|grad_q_kernel)<{_ANY}, ([0-9]+)>",
        "query_attention",
        loads_16=True,
        tensor=True,
        dynamic_shared=lambda m: 768 * int(m[1]),
    ),
    Promise(
        f"query_attention_grad_kv_kernel<({_ANY}), ([0-9]+)>",
        "query_attention",
        loads_16=True,
        tensor=True,
        dynamic_shared=lambda m: 768 * int(m[2]) + 256 if m[1] == "fp32" else 512 * int(m[2]) + 512,
    ),
    Promise(f"query_attention_merge_kernel<{_ANY}>", "query_attention"),
    # slot_head
    Promise(
        f"slot_head_detail::logits_kernel<{_ANY}, (64|128), (64|128)>",
        "slot_head",
        loads_16=True,
        tensor=True,
        dynamic_shared=lambda m: (3 if m[1] == "128" else 4) * (int(m[1]) + int(m[2])) * 128,
    ),
    Promise(
        f"slot_head_detail::product_kernel<{_ANY}>",
        "slot_head",
        loads_16=True,
        tensor=True,
        dynamic_shared=98304,
    ),
    Promise(
        "slot_head_detail::(?:normalise|merge|factor|norm_weight|norm_weight_sum|norm_states)_kernel(?:<.*>)?",
        "slot_head",
    ),
)


def promise_of(kernel: str) -> Promise:
    """The one entry for a kernel.

    Raises:
        LookupError: none, or more than one.
    """
    found = [p for p in PROMISES if re.fullmatch(p.kernels, kernel)]
    if len(found) != 1:
        raise LookupError(
            f"bench/cuda_promises.py has {len(found)} entries for the kernel {kernel}, expected 1"
        )
    return found[0]
