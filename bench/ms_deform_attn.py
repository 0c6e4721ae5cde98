"""Multi-scale deformable attention beside its peers, forward and with backward, at the paper's sizes.

    python bench/ms_deform_attn.py [--cases encoder decoder] [--threads 1 2] [--repeats 5]

Peers: the module of Hugging Face's Deformable DETR, and our own grid_sample form, which adds up level by
level and so needs less memory. Writes ``bench/results/ms_deform_attn_<n>_threads.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Limits, Row, Work, compare, measure_limits, print_rows, write_results
from torch import Tensor
from torch.nn import functional

from visionllm.ops import ms_deform_attn
from visionllm.ops.ms_deform_attn import SampleInputs, sample_inputs

# An 800 x 1333 picture at strides 8, 16, 32, 64: 22223 pixels.
PAPER = ((100, 167), (50, 84), (25, 42), (13, 21))
# A 224 x 224 picture at the same strides.
TINY = ((28, 28), (14, 14), (7, 7), (4, 4))


@dataclass(frozen=True)
class Case:
    options: dict
    slow_peers: bool  # seconds per call


CASES = {
    "encoder": Case(dict(batch=1, levels=PAPER, heads=8, channels=32, encoder=True), True),
    "decoder_300": Case(dict(batch=1, levels=PAPER, heads=8, channels=32, queries=300), False),
    "decoder_100": Case(dict(batch=1, levels=PAPER, heads=8, channels=32, queries=100), False),
    "tiny_encoder": Case(dict(batch=8, levels=TINY, heads=8, channels=16, encoder=True), True),
    "tiny_decoder": Case(dict(batch=8, levels=TINY, heads=8, channels=16, queries=100), False),
}


def grid_sample_form(
    value: Tensor, spatial_shapes: Tensor, _: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    by_head = value.permute(0, 2, 3, 1).flatten(0, 1)  # [B * H, D, S]
    grid = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1)  # [B * H, Q, L, P, 2]
    weights = attention_weights.transpose(1, 2).flatten(0, 1)[:, None]  # [B * H, 1, Q, L, P]
    output = value.new_zeros(batch * heads, channels, queries)
    start = 0
    for level, (height, width) in enumerate(spatial_shapes.tolist()):
        image = by_head[:, :, start : start + height * width].unflatten(2, (height, width))
        sampled = functional.grid_sample(image, grid[:, :, level], align_corners=False)  # [B * H, D, Q, P]
        output = output + (sampled * weights[:, :, :, level]).sum(-1)
        start += height * width
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def hugging_face_form() -> Callable[..., Tensor]:
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    module = MultiScaleDeformableAttention()

    def call(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return module(value, shapes, shapes.tolist(), starts, locations, weights, 64)

    return call


def work(inputs: SampleInputs, backward: bool) -> Work:
    """Forward: 4 products and sums per sampled channel. Backward: twice as many, for rows and weights."""
    value, _, _, locations, weights = inputs.args()
    channels = value.shape[3]
    output = locations.shape[0] * locations.shape[1] * value.shape[2] * channels
    gathered = weights.numel() * 4 * channels
    read_values = min(value.numel(), gathered)  # few queries cannot touch all pixels
    points = locations.numel() + weights.numel()
    elements = read_values + points + output
    if backward:
        elements += read_values + points + output  # read again
        elements += value.numel() + points  # the gradients
    return Work(elements * 4, gathered * 2 * (3 if backward else 1))


def run_case(name: str, case: Case, forms: dict[str, Callable], limits: Limits, repeats: int) -> list[Row]:
    inputs = sample_inputs(requires_grad=True, **case.options)
    leaves = [t for t in inputs.args() if t.requires_grad]
    expected = ms_deform_attn(*inputs.args()).detach()
    for form, function in forms.items():
        error = float((function(*inputs.args()).detach() - expected).abs().max())
        if not error < 1e-3:
            raise SystemExit(f"{name}: {form} differs from visionllm by {error}")
    grad_output = torch.randn_like(expected)

    def forward(function: Callable) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return function(*inputs.args())

        return call

    def both(function: Callable) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(*inputs.args()), leaves, grad_output)

    rows = []
    for label, wrap, backward in (("forward", forward, False), ("forward+backward", both, True)):
        counts = {form: repeats if form == "visionllm" or not case.slow_peers else 3 for form in forms}
        functions = {form: wrap(function) for form, function in forms.items()}
        rows += compare(f"{name} {label}", functions, work(inputs, backward), limits, counts)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9, help="calls of the fast ones (default %(default)s)")
    parser.add_argument("--name", default="ms_deform_attn", help="how the files in bench/results begin")
    options = parser.parse_args()
    forms = {
        "visionllm": ms_deform_attn,
        "hugging_face": hugging_face_form(),
        "grid_sample": grid_sample_form,
    }
    for threads in options.threads:
        torch.set_num_threads(threads)
        limits = measure_limits()
        rows = []
        for name in options.cases:
            new = run_case(name, CASES[name], forms, limits, options.repeats)
            print_rows(new)
            rows += new
        path = write_results(f"{options.name}_{threads}_threads", rows, {threads: limits})
        print(f"written to {path}")


if __name__ == "__main__":
    main()
