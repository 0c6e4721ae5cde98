"""Language fusion beside its peers, forward and with backward, at the paper's sizes.

    python bench/fusion_attention.py [--device cuda] [--cases tokens_64] [--types bfloat16] [--repeats 20]
                                     [--threads 1 2]

Peers: layer norm, projection, SDPA and projection in torch; on CUDA torch.compile of the same; the unfused
form that Grounding DINO has, with the scores in memory, their maximum over the whole tensor, and clamps. On
the CPU both types and 1 and 2 threads unless the options say otherwise. Writes
``bench/results/fusion_attention_<threads or GPU>.json``.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable

import torch
from harness import (
    Limits,
    Row,
    Work,
    add_device_option,
    compare,
    measure_limits,
    print_rows,
    require_device,
    results_name,
    write_results,
)
from torch import Tensor
from torch.nn import functional

from visionllm.ops import fusion_attention
from visionllm.ops.fusion_attention import SampleInputs, sample_inputs

# An 800 x 1333 picture at strides 8, 16, 32, 64.
PAPER = dict(batch=1, positions=22223, channels=256, heads=8)
# 224 x 224 pictures at the same strides, in the packaged model: a batch of training, and one.
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
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

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
    name: str, type_name: str, forms: dict[str, Form], limits: Limits, repeats: int, device: torch.device
) -> list[Row]:
    sizes = CASES[name]
    inputs = sample_inputs(
        device, TYPES[type_name], texts=(sizes["tokens"],) * sizes["batch"], requires_grad=True, **sizes
    )
    args, leaves = inputs.args(), inputs.leaves()
    expected = sdpa_form(*(t.detach().float() if t is not inputs.mask else t for t in args[:11]), args[11])
    usable = {}
    for form, function in forms.items():
        try:
            error = float((function(*args).detach().float() - expected).abs().max() / expected.abs().max())
        except torch.OutOfMemoryError as problem:
            print(f"{name}: skipped {form}: {str(problem).splitlines()[0]}")
            continue
        if not error < (1e-4 if type_name == "float32" else 3e-2):
            raise SystemExit(f"{name}: {form} differs from the float32 result by {error} of its maximum")
        usable[form] = function
    grad_output = torch.randn_like(inputs.x)

    def forward(function: Form) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return function(*args)

        return call

    def both(function: Form) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(*args), leaves, grad_output)

    rows = []
    for label, wrap, backward in (("forward", forward, False), ("forward+backward", both, True)):
        functions = {form: wrap(function) for form, function in usable.items()}
        rows += compare(
            f"{name} {type_name} {label}",
            functions,
            work(inputs, backward),
            limits,
            dict.fromkeys(functions, repeats),
            device,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_device_option(parser)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--types", nargs="+", choices=TYPES, help="(default bfloat16, on the CPU float32 too)"
    )
    parser.add_argument("--repeats", type=int, help="(default 30; on the CPU 3, of the small cases 20)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="on the CPU (default 1 2)")
    parser.add_argument("--name", default="fusion_attention", help="how the file in bench/results begins")
    options = parser.parse_args()
    device = require_device(options.device)
    forms: dict[str, Form] = {"visionllm": fusion_attention, "sdpa": sdpa_form, "unfused": unfused_form}
    if device.type == "cuda":
        forms["sdpa_compiled"] = torch.compile(sdpa_form, dynamic=False)
        run(results_name(options.name, device), options, forms, device)
        return
    for threads in options.threads:
        torch.set_num_threads(threads)
        run(f"{options.name}_{threads}_threads", options, forms, device)


def run(file: str, options: argparse.Namespace, forms: dict[str, Form], device: torch.device) -> None:
    on_cuda = device.type == "cuda"
    limits: dict[str, Limits] = {}
    rows: list[Row] = []
    for type_name in options.types or (["bfloat16"] if on_cuda else ["float32", "bfloat16"]):
        limits[type_name] = measure_limits(device, TYPES[type_name])
        for name in options.cases:
            small = CASES[name]["batch"] * CASES[name]["positions"] < 10000
            repeats = options.repeats or (30 if on_cuda else 20 if small else 3)
            new = run_case(name, type_name, forms, limits[type_name], repeats, device)
            print_rows(new)
            rows += new
            gc.collect()
    print(f"written to {write_results(file, rows, limits, device)}")


if __name__ == "__main__":
    main()
