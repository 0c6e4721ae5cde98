"""Language fusion beside its peers, forward and with backward, at the paper's sizes.

    python bench/fusion_attention.py [--device cuda] [--cases tokens_64] [--types bfloat16] [--repeats 20]
                                     [--threads 1 2]

Peers: layer norm, projection, SDPA and projection in torch; on CUDA torch.compile of the same; the unfused
form that Grounding DINO has, with the scores in memory, their maximum over the whole tensor, and clamps. On
the CPU both types and 1 and 2 threads unless the options say otherwise. Writes
``bench/results/fusion_attention_<threads or GPU>.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from harness import Limits, Row, Work, compare, require_device
from operator_bench import (
    Measurement,
    chosen_types,
    operator_parser,
    relative_error,
    run_measurements,
    type_name,
    with_backward,
    without_grad,
)
from torch import Tensor
from torch.nn import functional

from visionllm.ops import fusion_attention
from visionllm.ops.fusion_attention import SampleInputs, sample_inputs

# An 800 x 1333 picture at strides 8, 16, 32, 64.
PAPER = dict(batch=1, positions=22223, channels=256, heads=8)
# 224 x 224 pictures at the same strides: a batch of training, and one.
TINY = dict(batch=8, positions=1045, channels=128, heads=4)
TINY_ONE = TINY | dict(batch=1)
CASES = {
    "tokens_16": dict(tokens=16, **PAPER),
    "tokens_64": dict(tokens=64, **PAPER),
    "tokens_256": dict(tokens=256, **PAPER),
    "tiny_tokens_16": dict(tokens=16, **TINY),
    "tiny_one_20": dict(tokens=20, **TINY_ONE),
    "tiny_one_100": dict(tokens=100, **TINY_ONE),
    "tiny_one_400": dict(tokens=400, **TINY_ONE),
}

Form = Callable[..., Tensor]


def sdpa_form(
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
) -> Tensor:
    normed = functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, epsilon)
    query = functional.linear(normed, query_weight, query_bias).unflatten(2, key.shape[2:])
    attended = functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (query, key, value)), attn_mask=mask[:, None, None]
    )
    return x + gate * functional.linear(attended.transpose(1, 2).flatten(2), output_weight, output_bias)


def unfused_form(
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
) -> Tensor:
    batch, positions, channels = x.shape
    heads, width = key.shape[2:]
    normed = functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, epsilon)
    query = functional.linear(normed, query_weight, query_bias) * width**-0.5
    query, keys, values = (
        t.reshape(batch, -1, heads, width).transpose(1, 2).reshape(batch * heads, -1, width)
        for t in (query, key, value)
    )
    scores = torch.bmm(query, keys.transpose(1, 2))  # [B * H, N, T]
    scores = (scores - scores.max()).clamp(-50000, 50000)
    hidden = ~mask[:, None, None].expand(batch, heads, positions, -1).reshape(scores.shape)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    attended = torch.bmm(weights, values).view(batch, heads, positions, width)
    attended = attended.transpose(1, 2).reshape(batch, positions, channels)
    return x + gate * functional.linear(attended, output_weight, output_bias)


def work(inputs: SampleInputs, backward: bool) -> Work:
    """Bytes: x in and out; with backward x and two gradients more. Products: two projections and two with the
    tokens; with backward twice as many more.
    """
    batch, positions, channels = inputs.x.shape
    tokens = inputs.key.shape[1]
    small = 2 * channels * channels + 2 * batch * tokens * channels
    elements = 2 * inputs.x.numel() + small
    if backward:
        elements += 3 * inputs.x.numel() + 2 * small
    flops = 2 * batch * positions * channels * (2 * channels + 2 * tokens)
    return Work(elements * inputs.x.element_size(), flops * (3 if backward else 1))


def run_case(
    name: str, dtype: torch.dtype, forms: dict[str, Form], limits: Limits, repeats: int, device: torch.device
) -> list[Row]:
    sizes = CASES[name]
    inputs = sample_inputs(
        device, dtype, texts=(sizes["tokens"],) * sizes["batch"], requires_grad=True, **sizes
    )
    args, leaves = inputs.args(), inputs.leaves()
    expected = sdpa_form(*(t.detach().float() if t is not inputs.mask else t for t in args[:11]), args[11])
    usable: dict[str, Callable[[], Tensor]] = {}
    for form, function in forms.items():
        try:
            error = relative_error(function(*args), expected)
        except torch.OutOfMemoryError as problem:
            print(f"{name}: skipped {form}: {str(problem).splitlines()[0]}")
            continue
        if not error < (1e-4 if dtype == torch.float32 else 3e-2):
            raise SystemExit(f"{name}: {form} differs from the float32 result by {error} of its maximum")
        usable[form] = partial(function, *args)
    grad_output = torch.randn_like(inputs.x)

    functions = {form: without_grad(call) for form, call in usable.items()}
    counts = dict.fromkeys(usable, repeats)
    title = f"{name} {type_name(dtype)}"
    rows = compare(f"{title} forward", functions, work(inputs, False), limits, counts, device)
    functions = {form: with_backward(call, leaves, grad_output) for form, call in usable.items()}
    rows += compare(f"{title} forward+backward", functions, work(inputs, True), limits, counts, device)
    return rows


def main() -> None:
    parser = operator_parser(
        __doc__, "fusion_attention", CASES, "(default 30; on the CPU 3, of the small cases 20)"
    )
    options = parser.parse_args()
    device = require_device(options.device)
    on_cuda = device.type == "cuda"
    forms: dict[str, Form] = {"visionllm": fusion_attention, "sdpa": sdpa_form, "unfused": unfused_form}
    if on_cuda:
        forms["sdpa_compiled"] = torch.compile(sdpa_form, dynamic=False)

    def measurement(name: str, dtype: torch.dtype) -> Measurement:
        small = CASES[name]["batch"] * CASES[name]["positions"] < 10000
        repeats = options.repeats or (30 if on_cuda else 20 if small else 3)
        return Measurement(dtype, lambda limits: run_case(name, dtype, forms, limits, repeats, device))

    measurements = [
        measurement(name, dtype) for dtype in chosen_types(options, device) for name in options.cases or CASES
    ]
    run_measurements(options, device, measurements)


if __name__ == "__main__":
    main()
