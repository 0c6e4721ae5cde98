"""Multi-scale deformable attention beside its peers, forward and with backward, at the paper's sizes.

    python bench/ms_deform_attn.py [--cases encoder] [--threads 1 2] [--types float32] [--repeats 5]
    python bench/ms_deform_attn.py --device cuda [--cases encoder] [--types bfloat16 float32]

Peers: the module of Hugging Face's Deformable DETR, and our own grid_sample form, which adds up level by
level and so needs less memory; on CUDA also the latter compiled by torch.compile, and mmcv, DCNv4 and
msda-triton where they are installed. There, peers that take one type only get float32, or all in value's
type, converted before the time is taken; on the CPU they compute in float32, and convert within their time.
``visionllm_fused`` begins with logits, offsets and reference points, as DCNv4 begins with logits. On the CPU
it stands in the "layer" rows, where softmax and locations are in the peers' time, by torch. Writes
``bench/results/ms_deform_attn_<n>_threads.json``, on CUDA ``..._<gpu>.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

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
from operator_bench import reason, type_name, with_backward, without_grad
from torch import Tensor
from torch.nn import functional

from visionllm.ops import ms_deform_attn, ms_deform_attn_fused
from visionllm.ops.ms_deform_attn import SampleInputs, sample_inputs
from visionllm.ops.ms_deform_attn_fused import sample_inputs as fused_sample_inputs

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
    return grid_sample_levels(value, spatial_shapes.tolist(), sampling_locations, attention_weights)


def grid_sample_levels(
    value: Tensor, levels: list[list[int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    by_head = value.permute(0, 2, 3, 1).flatten(0, 1)  # [B * H, D, S]
    grid = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1)  # [B * H, Q, L, P, 2]
    weights = attention_weights.transpose(1, 2).flatten(0, 1)[:, None]  # [B * H, 1, Q, L, P]
    output = value.new_zeros(batch * heads, channels, queries)
    start = 0
    for level, (height, width) in enumerate(levels):
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
    size = value.element_size()
    read_values = min(value.numel(), gathered) * size  # few queries cannot touch all pixels
    points = locations.numel() * locations.element_size() + weights.numel() * weights.element_size()
    moved = read_values + points + output * size
    if backward:
        moved += read_values + points + output * size  # read again
        moved += value.numel() * size + points  # the gradients
    return Work(moved, gathered * 2 * (3 if backward else 1))


def cpu_forms() -> dict[str, Callable[..., Tensor]]:
    return {
        "visionllm": ms_deform_attn,
        "hugging_face": hugging_face_form(),
        "grid_sample": grid_sample_form,
    }


def in_float32(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For bfloat16: torch 2.13's grid_sample gives NaN for some strided bfloat16 inputs on the CPU."""

    def call(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return form(value.float(), shapes, starts, locations, weights.float()).to(value.dtype)

    return call


def as_layer(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """From logits, offsets and reference points, as the layers of a model have them, by torch."""

    def call(
        value: Tensor, shapes: Tensor, starts: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor
    ) -> Tensor:
        cells = shapes.flip(-1)[:, None].to(offsets.dtype)  # [L, 1, 2] as (width, height)
        locations = reference[:, :, None, :, None] + offsets / cells
        weights = logits.flatten(3).softmax(-1).view(logits.shape)
        return form(value, shapes, starts, locations, weights)

    return call


def run_case(name: str, case: Case, dtype: torch.dtype, limits: Limits, repeats: int) -> list[Row]:
    plain = sample_inputs(dtype=dtype, requires_grad=True, **case.options)
    layer = fused_sample_inputs(dtype=dtype, requires_grad=True, **case.options)
    layer = replace(layer, reference_points=layer.reference_points.detach())  # a detector's have no gradient
    forms = cpu_forms()
    if dtype != torch.float32:
        peers = [form for form in forms if form != "visionllm"]
        forms |= {form: in_float32(forms[form]) for form in peers}
    layers = {"visionllm_fused": ms_deform_attn_fused}
    layers |= {form: as_layer(forms[form]) for form in ("visionllm", "hugging_face")}
    label = name if dtype == torch.float32 else f"{name} {type_name(dtype)}"
    amounts = work(plain, False), work(plain, True)
    return [
        *time_forms(label, case, forms, plain.args(), amounts, limits, repeats),
        *time_forms(f"{label} layer", case, layers, layer.args(), amounts, limits, repeats),
    ]


def time_forms(
    label: str,
    case: Case,
    forms: dict[str, Callable[..., Tensor]],
    args: tuple[Tensor, ...],
    amounts: tuple[Work, Work],
    limits: Limits,
    repeats: int,
) -> list[Row]:
    """Forward, then forward and backward, of every form, which must all give the same."""
    leaves = [t for t in args if t.requires_grad]
    expected = next(iter(forms.values()))(*args).detach()
    allowed = 1e-3 if expected.dtype == torch.float32 else 2e-2 * float(expected.abs().max())
    for form, function in forms.items():
        error = float((function(*args).detach() - expected).abs().max())
        if not error < allowed:
            raise SystemExit(f"{label}: {form} differs by {error}")
    grad_output = torch.randn_like(expected)

    calls = {form: partial(function, *args) for form, function in forms.items()}
    counts = {f: repeats if f.startswith("visionllm") or not case.slow_peers else 3 for f in forms}
    functions = {form: without_grad(call) for form, call in calls.items()}
    rows = compare(f"{label} forward", functions, amounts[0], limits, counts)
    functions = {form: with_backward(call, leaves, grad_output) for form, call in calls.items()}
    rows += compare(f"{label} forward+backward", functions, amounts[1], limits, counts)
    return rows


# ---- CUDA -------------------------------------------------------------------------------------------------

# What a call needs beside its gradient leaves is made once, outside the time taken.
Prepared = tuple[Callable[[], Tensor], list[Tensor]]


def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_()


def cuda_forms(inputs: SampleInputs) -> dict[str, Prepared]:
    """Ours and each peer that is installed, with inputs as it wants them; others are named and left out."""
    value, shapes, starts, locations, weights = inputs.args()
    host = shapes.cpu(), starts.cpu()
    forms: dict[str, Prepared] = {}

    def add(name: str, make: Callable[[], Prepared]) -> None:
        try:
            forms[name] = make()
        except Exception as error:  # not installed, or not for this size, type or GPU
            print(f"  without {name}: {reason(error)}", flush=True)

    def ours() -> Prepared:
        args = leaf(value), leaf(locations), leaf(weights)
        return lambda: ms_deform_attn(args[0], *host, args[1], args[2]), list(args)

    def ours_fused() -> Prepared:
        cells = shapes.flip(-1)[:, None].to(locations.dtype)
        centre = locations.mean(4).mean(2)  # [B, Q, L, 2]
        offsets = (locations - centre[:, :, None, :, None]) * cells
        args = leaf(value), leaf(centre), leaf(offsets), leaf(weights.float().log())
        return lambda: ms_deform_attn_fused(args[0], *host, *args[1:]), [args[0], *args[2:]]

    def plain(form: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Prepared:
        """Peers that want all in one type."""
        args = leaf(value, dtype), leaf(locations, dtype or value.dtype), leaf(weights, dtype)
        return lambda: form(args[0], shapes, starts, args[1], args[2]), list(args)

    def compiled() -> Prepared:
        levels = shapes.tolist()

        def form(v: Tensor, _: Tensor, s: Tensor, points: Tensor, w: Tensor) -> Tensor:
            return grid_sample_levels(v, levels, points, w)

        return plain(torch.compile(form))

    def mmcv() -> Prepared:
        from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

        return plain(lambda *a: MultiScaleDeformableAttnFunction.apply(*a, 64), torch.float32)

    def dcnv4() -> Prepared:
        from DCNv4.functions import FlashDeformAttnFunction

        packed = torch.cat([locations.flatten(3), weights.float().log().flatten(3)], -1)
        args = leaf(value), leaf(packed, value.dtype)
        points = weights.shape[-1]
        return lambda: FlashDeformAttnFunction.apply(args[0], shapes, starts, args[1], 64, points), list(args)

    def msda_triton() -> Prepared:
        from msda_triton import multiscale_deformable_attention

        def form(v: Tensor, s: Tensor, _: Tensor, points: Tensor, w: Tensor) -> Tensor:
            return multiscale_deformable_attention(
                v, s, points, w, padding_mode="zeros", align_corners=False
            ).flatten(-2)

        return plain(form, torch.float32)

    add("visionllm", ours)
    add("visionllm_fused", ours_fused)
    add("grid_sample", lambda: plain(grid_sample_form))
    add("grid_sample_compiled", compiled)
    add("hugging_face", lambda: plain(hugging_face_form()))
    add("mmcv", mmcv)
    add("dcnv4", dcnv4)
    add("msda_triton", msda_triton)
    return forms


def run_cuda_case(name: str, case: Case, dtype: torch.dtype, limits: Limits, repeats: int) -> list[Row]:
    inputs = sample_inputs("cuda", dtype, **case.options)
    forms = cuda_forms(inputs)
    expected = forms["visionllm"][0]().detach().float()
    scale = float(expected.abs().max())
    for form, (call, leaves) in list(forms.items()):
        try:
            output = call()
            error = float((output.detach().float() - expected).abs().max()) / scale
            torch.autograd.grad(output, leaves, torch.ones_like(output))
        except Exception as problem:
            print(f"  without {form}: {reason(problem)}", flush=True)
            del forms[form]
            continue
        # Peers that round locations to 8 bits are off by a third of a pixel: said, and left in.
        print(f"  {form}: differs from visionllm by {error:.1e} of the largest output", flush=True)

    label = type_name(dtype)
    calls = {form: without_grad(call) for form, (call, _) in forms.items()}
    counts = {form: repeats if form.startswith("visionllm") else min(repeats, 9) for form in forms}
    rows = compare(f"{name} {label} forward", calls, work(inputs, False), limits, counts, "cuda")
    calls = {
        form: with_backward(call, leaves, torch.randn_like(call())) for form, (call, leaves) in forms.items()
    }

    def deterministic() -> object:
        torch.use_deterministic_algorithms(True)
        try:
            return calls["visionllm"]()
        finally:
            torch.use_deterministic_algorithms(False)

    # Else torch fills what it allocates with NaN, which is no part of the operator.
    torch.utils.deterministic.fill_uninitialized_memory = False
    calls["visionllm_deterministic"] = deterministic
    counts["visionllm_deterministic"] = repeats
    rows += compare(f"{name} {label} forward+backward", calls, work(inputs, True), limits, counts, "cuda")
    return rows


def run_on_cuda(options: argparse.Namespace, device: torch.device) -> None:
    rows, limits = [], {}
    for kind in options.types:
        dtype = getattr(torch, kind)
        limits[kind] = measure_limits(device, dtype)
        for name in options.cases:
            new = run_cuda_case(name, CASES[name], dtype, limits[kind], options.repeats)
            print_rows(new)
            rows += new
            torch.cuda.empty_cache()
    print(f"written to {write_results(results_name(options.name, device), rows, limits, device)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9, help="calls of the fast ones (default %(default)s)")
    parser.add_argument("--name", default="ms_deform_attn", help="how the files in bench/results begin")
    parser.add_argument(
        "--types", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"],
        help="of value (default %(default)s)",
    )  # fmt: skip
    add_device_option(parser)
    options = parser.parse_args()
    device = require_device(options.device)
    if device.type == "cuda":
        run_on_cuda(options, device)
        return
    for threads in options.threads:
        torch.set_num_threads(threads)
        limits = measure_limits()
        rows = []
        for name in options.cases:
            for kind in options.types:
                new = run_case(name, CASES[name], getattr(torch, kind), limits, options.repeats)
                print_rows(new)
                rows += new
        path = write_results(f"{options.name}_{threads}_threads", rows, {threads: limits})
        print(f"written to {path}")


if __name__ == "__main__":
    main()
