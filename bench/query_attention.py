"""Batched query decoding beside its peers, forward and with backward, at the paper's sizes.

    python bench/query_attention.py [--cases boxes_300 tiny_400] [--threads 1 2] [--types float32 bfloat16]
    python bench/query_attention.py --device cuda [--cases boxes_300 points_300] [--repeats 20]

Peers: one SDPA over all keys with a mask; the prefix copied into every group and SDPA over the groups; the
two products and the softmax between them in plain torch (CPU); flex_attention, compiled (CUDA, two cases: it
takes long to compile); a cascade of FlashInfer's kernels and its merge (CUDA, forward only). They get q and k
rotated already; ours rotates them itself. bfloat16 on CUDA. Writes
``bench/results/query_attention_<threads or GPU>.json``, anew after each case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from harness import Limits, Row, Work, compare, require_device
from operator_bench import (
    Measurement,
    chosen_types,
    operator_parser,
    reason,
    relative_error,
    run_measurements,
    type_name,
    with_backward,
    without_grad,
)
from torch import Tensor
from torch.nn import functional

from visionllm.model.llm import apply_rope
from visionllm.ops import query_attention, query_attention_reference
from visionllm.ops.query_attention import SampleInputs, sample_inputs

LLAMA_7B = dict(heads=32, kv_heads=32, channels=128)
LLAMA_8B = dict(heads=32, kv_heads=8, channels=128)  # of version 3
# 100 boxes as class and four corners; 100 outlines as class and 24 points.
BOXES, POINTS = dict(groups=100, slots=5), dict(groups=100, slots=49)
CASES = {
    "boxes_300": dict(prefix=300, lengths=(300,), **BOXES, **LLAMA_7B),
    "points_300": dict(prefix=300, lengths=(300,), **POINTS, **LLAMA_7B),
    "boxes_1200": dict(prefix=1200, lengths=(1200,), **BOXES, **LLAMA_7B),
    "points_1200": dict(prefix=1200, lengths=(1200,), **POINTS, **LLAMA_7B),
    "boxes_300_gqa": dict(prefix=300, lengths=(300,), **BOXES, **LLAMA_8B),
    "points_1200_gqa": dict(prefix=1200, lengths=(1200,), **POINTS, **LLAMA_8B),
}
# The packaged model: 64 image tokens, 100 to 700 tokens of picture and instruction.
TINY = dict(groups=64, slots=5, heads=6, kv_heads=3, channels=32)
TINY_CASES = {
    f"tiny_{prefix}" + (f"_x{batch}" if batch > 1 else ""): dict(
        prefix=prefix, lengths=(prefix,) * batch, **TINY
    )
    for batch in (1, 8)
    for prefix in (100, 400, 700)
}
ON_CUDA = tuple(CASES)
ON_CPU = ("boxes_300", "boxes_300_gqa", *TINY_CASES)  # the others take minutes, copied KV many gigabytes
CASES |= TINY_CASES
# Fast enough to be called often: a call of the slowest peer takes less than a second.
QUICK = tuple(TINY_CASES)

Form = Callable[..., Tensor]


@dataclass(frozen=True)
class Peer:
    prepare: Callable[[SampleInputs], Form]  # what does not belong to a call: masks, plans
    backward: bool = True
    device: str = ""  # the only one it is for
    cases: tuple[str, ...] = tuple(CASES)


def masked(inputs: SampleInputs) -> Form:
    """One SDPA; keys are the prefix and all slots: [B, H, M S, D] with a mask [M S, P + M S]."""
    _, groups, slots, heads, channels = inputs.q.shape
    group = torch.arange(groups * slots, device=inputs.q.device) // slots
    own = (group[:, None] == group).tril()
    mask = torch.cat([own.new_ones(groups * slots, inputs.prefix_k.shape[1]), own], 1)

    def call(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        query = q.flatten(1, 2).transpose(1, 2)
        key, value = (
            torch.cat([p, t.flatten(1, 2)], 1).transpose(1, 2) for p, t in ((prefix_k, k), (prefix_v, v))
        )
        y = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return y.transpose(1, 2).reshape(-1, groups, slots, heads, channels)

    return call


def copied(inputs: SampleInputs) -> Form:
    """What an ordinary decoder's cache does: the prefix is copied into every group. [B M, H, S, D]"""
    _, groups, slots, heads, channels = inputs.q.shape
    prefix = inputs.prefix_k.shape[1]
    mask = torch.ones(slots, prefix + slots, dtype=torch.bool, device=inputs.q.device).tril(prefix)

    def call(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        key, value = (
            torch.cat([p[:, None].expand(-1, groups, -1, -1, -1), t], 2).flatten(0, 1).transpose(1, 2)
            for p, t in ((prefix_k, k), (prefix_v, v))
        )
        query = q.flatten(0, 1).transpose(1, 2)
        y = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return y.transpose(1, 2).reshape(-1, groups, slots, heads, channels)

    return call


def plain(inputs: SampleInputs) -> Form:
    """The reference: as ours, the prefix once for all groups; scores of all rows and keys in memory."""

    def call(*tensors: Tensor) -> Tensor:
        return query_attention_reference(*tensors, inputs.prefix_length, None)

    return call


def flex(inputs: SampleInputs) -> Form:
    """The same keys as `masked`, with the mask as a function that whole blocks are left out by."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _, groups, slots, heads, channels = inputs.q.shape
    prefix, rows = inputs.prefix_k.shape[1], groups * slots

    def seen(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        own = key - prefix
        return (key < prefix) | ((own // slots == row // slots) & (own <= row))

    block_mask = create_block_mask(seen, None, None, rows, prefix + rows, device=inputs.q.device)
    compiled = torch.compile(flex_attention, fullgraph=True)

    def call(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        query = q.flatten(1, 2).transpose(1, 2)
        key, value = (
            torch.cat([p, t.flatten(1, 2)], 1).transpose(1, 2) for p, t in ((prefix_k, k), (prefix_v, v))
        )
        y = compiled(query, key, value, block_mask=block_mask, enable_gqa=query.shape[1] != key.shape[1])
        return y.transpose(1, 2).reshape(-1, groups, slots, heads, channels)

    return call


def flashinfer_cascade(inputs: SampleInputs) -> Form:
    """The prefix once for all rows, each group's slots in a batch, and the merge of the two states."""
    import flashinfer

    _, groups, slots, heads, channels = inputs.q.shape
    device = inputs.q.device
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
    own = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    starts = torch.arange(0, (groups + 1) * slots, slots, dtype=torch.int32, device=device)
    own.plan(starts, starts, heads, inputs.k.shape[3], channels, causal=True, q_data_type=inputs.q.dtype)

    def call(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        query = q[0].flatten(0, 1)
        far = flashinfer.single_prefill_with_kv_cache(
            query, prefix_k[0], prefix_v[0], causal=False, return_lse=True
        )
        near = own.run(query, k[0].flatten(0, 1), v[0].flatten(0, 1), return_lse=True)
        return flashinfer.merge_state(*far, *near)[0].view(q.shape)

    return call


PEERS = {
    "sdpa_masked": Peer(masked),
    "sdpa_copied": Peer(copied),
    "plain_torch": Peer(plain, device="cpu"),
    "flex_attention": Peer(flex, device="cuda", cases=("boxes_300", "points_300")),
    "flashinfer": Peer(flashinfer_cascade, backward=False, device="cuda"),
}


def work(inputs: SampleInputs, backward: bool) -> Work:
    """Forward: scores and sums, two products. Backward: scores again and four more, inputs read again."""
    q, k, _, prefix_k, _, _, _ = inputs.args()
    batch, groups, slots, heads, channels = q.shape
    pairs = batch * groups * heads * (slots * prefix_k.shape[1] + slots * (slots + 1) // 2)
    inputs_only = q.numel() + 2 * k.numel() + 2 * prefix_k.numel()
    elements = inputs_only + q.numel()
    if backward:
        elements += 2 * inputs_only + 2 * q.numel()  # gradients; with the output and its gradient
    return Work(elements * q.element_size(), (7 if backward else 2) * 2 * pairs * channels)


def rotated(inputs: SampleInputs) -> SampleInputs:
    """With q and k rotated, and no table."""
    assert inputs.rope is not None
    groups, slots = inputs.q.shape[1:3]
    position = inputs.prefix_length[:, None] + torch.arange(slots, device=inputs.q.device)  # [B, S]
    cosine, sine = (t[position].repeat(1, groups, 1)[:, :, None] for t in inputs.rope)
    q, k = (
        apply_rope(t.detach().float().flatten(1, 2), (cosine, sine))
        .view(t.shape)
        .to(t.dtype)
        .requires_grad_()
        for t in (inputs.q, inputs.k)
    )
    return SampleInputs(q, k, *inputs.args()[2:6], None)


def run_case(name: str, dtype: torch.dtype, limits: Limits, repeats: int, device: torch.device) -> list[Row]:
    inputs = sample_inputs(device, dtype, requires_grad=True, **CASES[name])
    turned = rotated(inputs)
    expected = query_attention(*inputs.args()).detach()
    grad_output = torch.randn_like(expected)
    forms = {"visionllm": lambda *tensors: query_attention(*tensors, inputs.prefix_length, inputs.rope)}
    arguments = {"visionllm": inputs.args()[:5]}
    for peer_name, peer in PEERS.items():
        if name not in peer.cases or peer.device not in ("", device.type):
            continue
        try:
            form = peer.prepare(turned)
            with torch.no_grad():
                difference = relative_error(form(*turned.args()[:5]), expected)
        except Exception as problem:
            print(f"{name}: {peer_name} left out: {reason(problem)}")
            continue
        if not difference < (1e-4 if dtype == torch.float32 else 2e-2):
            raise SystemExit(
                f"{name}: {peer_name} differs from visionllm by {difference} of the largest output"
            )
        forms[peer_name], arguments[peer_name] = form, turned.args()[:5]

    calls = {form: partial(function, *arguments[form]) for form, function in forms.items()}
    counts = dict.fromkeys(calls, repeats)
    title = name if dtype == torch.bfloat16 and device.type == "cuda" else f"{name} {type_name(dtype)}"
    functions = {form: without_grad(call) for form, call in calls.items()}
    rows = compare(f"{title} forward", functions, work(inputs, False), limits, counts, device)
    functions = {
        form: with_backward(call, arguments[form], grad_output)
        for form, call in calls.items()
        if form == "visionllm" or PEERS[form].backward
    }
    rows += compare(f"{title} forward+backward", functions, work(inputs, True), limits, counts, device)
    return rows


def main() -> None:
    parser = operator_parser(
        __doc__, "query_attention", CASES, "(default 30; on the CPU 15, with long calls 3)"
    )
    options = parser.parse_args()
    device = require_device(options.device)
    on_cuda = device.type == "cuda"

    def measurement(name: str, dtype: torch.dtype) -> Measurement:
        repeats = options.repeats or (30 if on_cuda else 15 if name in QUICK else 3)
        return Measurement(dtype, lambda limits: run_case(name, dtype, limits, repeats, device))

    measurements = [
        measurement(name, dtype)
        for name in options.cases or (ON_CUDA if on_cuda else ON_CPU)
        for dtype in chosen_types(options, device)
    ]
    run_measurements(options, device, measurements)


if __name__ == "__main__":
    main()
