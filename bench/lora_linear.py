"""A linear layer with low-rank adapters beside its peers, forward and with backward, at the paper's sizes.

    python bench/lora_linear.py [--device cpu|cuda] [--rows 1 64 ...] [--cases base int8 mixed] [--repeats 20]

Peers: the bare layer without adapter (the yardstick: what the adapter costs), the layer and addmm,
torch.compile of that, and, where they are installed, PEFT, LoRAFusion and punica. Each result is held against
ours first. On the CPU, where the operator has no kernel of its own yet, sizes are smaller.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

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
from torch import Tensor, nn
from torch.nn import functional

from visionllm.ops import lora_linear
from visionllm.ops.lora_linear import SampleInputs, sample_inputs

ROWS = {"cuda": (1, 64, 313, 500, 900, 4900), "cpu": (1, 64, 313)}
FEATURES = {"cuda": 4096, "cpu": 1024}
RANK = 16
# Largest error of a peer against ours, over the largest output.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Form = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    options: dict
    backward: bool


CASES = {
    "base": Case(dict(), True),
    "int8": Case(dict(int8=True), False),
    "mixed": Case(dict(adapters=8, indexed=True), True),
}


def base_only(inputs: SampleInputs) -> Form:
    x, weight = inputs.x, inputs.weight
    return lambda: functional.linear(x, weight)


def addmm(inputs: SampleInputs) -> Form:
    x, weight, _, lora_a, lora_b, scale, *_ = inputs.args()
    assert lora_a is not None and lora_b is not None

    def call() -> Tensor:
        low_rank = functional.linear(x, lora_a[0])
        return torch.addmm(functional.linear(x, weight), low_rank, lora_b[0].T, alpha=float(scale))

    return call


def compiled_addmm(inputs: SampleInputs) -> Form:
    return torch.compile(addmm(inputs), dynamic=False)


def int8_dequantised(inputs: SampleInputs) -> Form:
    """The whole base in x's type first, as bitsandbytes and unsloth do it."""
    x, weight, _, lora_a, lora_b, scale, _, weight_scale = inputs.args()
    assert lora_a is not None and lora_b is not None and weight_scale is not None

    def call() -> Tensor:
        full = (weight.to(x.dtype) * weight_scale[:, None]).to(x.dtype)
        low_rank = functional.linear(x, lora_a[0])
        return torch.addmm(functional.linear(x, full), low_rank, lora_b[0].T, alpha=float(scale))

    return call


def by_adapter(inputs: SampleInputs) -> Form:
    """One adapter after the other on its own rows, as PEFT treats a mixed batch."""
    x, weight, _, lora_a, lora_b, scale, index, _ = inputs.args()
    assert lora_a is not None and lora_b is not None and index is not None and isinstance(scale, Tensor)
    rows = [(index == adapter).nonzero()[:, 0] for adapter in range(lora_a.shape[0])]
    factors = scale.tolist()

    def call() -> Tensor:
        output = functional.linear(x, weight)
        for adapter, mine in enumerate(rows):
            term = functional.linear(functional.linear(x[mine], lora_a[adapter]), lora_b[adapter])
            output = output.index_add(0, mine, term, alpha=factors[adapter])
        return output

    return call


def peft(inputs: SampleInputs) -> Form:
    from peft import LoraConfig, get_peft_model

    x, weight, _, lora_a, lora_b, scale, *_ = inputs.args()
    assert lora_a is not None and lora_b is not None
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=x.device, dtype=x.dtype)
    rank = lora_a.shape[1]
    config = LoraConfig(r=rank, lora_alpha=float(scale) * rank, target_modules=["0"], lora_dropout=0.0)
    model = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(weight)
    layer.lora_A["default"].weight = nn.Parameter(lora_a[0].detach().clone())
    layer.lora_B["default"].weight = nn.Parameter(lora_b[0].detach().clone())
    return lambda: layer(x)


def lorafusion(inputs: SampleInputs) -> Form:
    from lorafusion.ops.lora_v1 import fused_linear_lora

    x, weight, _, lora_a, lora_b, scale, *_ = inputs.args()
    assert lora_a is not None and lora_b is not None
    return lambda: fused_linear_lora(x[None], weight, lora_a[0], lora_b[0], float(scale), seed=0)[0]


def punica(inputs: SampleInputs) -> Form:
    from punica import add_lora_bgmv

    x, weight, _, lora_a, lora_b, scale, index, _ = inputs.args()
    assert lora_a is not None and lora_b is not None
    if index is None:
        index = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    factor = 1.0
    if isinstance(scale, Tensor):
        lora_b = (lora_b * scale[:, None, None]).to(x.dtype)
    else:
        factor = float(scale)

    def call() -> Tensor:
        output = functional.linear(x, weight)
        add_lora_bgmv(output, x, lora_a[:, None], lora_b[:, None], index, 0, factor)
        return output

    return call


# Those marked True are differentiable in x, A and B.
FORMS: dict[str, dict[str, tuple[Callable[[SampleInputs], Form], bool]]] = {
    "base": {
        "base_only": (base_only, False),
        "addmm": (addmm, True),
        "compiled_addmm": (compiled_addmm, True),
        "peft": (peft, False),
        "lorafusion": (lorafusion, True),
        "punica": (punica, False),
    },
    "int8": {"dequantised": (int8_dequantised, False)},
    "mixed": {"base_only": (base_only, False), "by_adapter": (by_adapter, True), "punica": (punica, False)},
}


def work(inputs: SampleInputs, backward: bool) -> Work:
    """Forward: each operand once. Backward: the gradients of x, A and B, for which all is read again."""
    x, weight, _, lora_a, lora_b, *_ = inputs.args()
    assert lora_a is not None and lora_b is not None
    rows, outputs = x.shape[0], weight.shape[0]
    forward = [x, weight, lora_a, lora_b]
    size = sum(t.numel() * t.element_size() for t in forward) + rows * outputs * x.element_size()
    base = 2 * rows * outputs * x.shape[1]
    adapter = 2 * rows * lora_a.shape[1] * (x.shape[1] + outputs)
    if backward:
        written = (x.numel() + lora_a.numel() + lora_b.numel()) * x.element_size()
        return Work(2 * size + written, 2 * base + 3 * adapter)
    return Work(size, base + adapter)


def run_case(
    name: str, rows: int, dtype: torch.dtype, device: torch.device, limits: Limits, repeats: int
) -> list[Row]:
    case = CASES[name]
    features = FEATURES[device.type]
    inputs = sample_inputs(
        device,
        dtype,
        rows=rows,
        inputs=features,
        outputs=features,
        rank=RANK,
        bias=False,
        requires_grad=True,
        **case.options,
    )
    if name == "mixed":  # punica has no rows without adapter
        index = inputs.adapter_index
        assert index is not None
        index.clamp_(min=0)
    forms: dict[str, Form] = {"visionllm": lambda: lora_linear(*inputs.args())}
    with torch.no_grad():
        expected = forms["visionllm"]().float()
    differentiable = ["visionllm"]
    for peer, (make, has_backward) in FORMS[name].items():
        try:
            form = make(inputs)
            with torch.no_grad():
                error = float((form().float() - expected).abs().max() / expected.abs().max())
        except Exception as problem:  # a peer that is not installed, or not for this device, type or size
            print(
                f"{name} T={rows}: without {peer}: {type(problem).__name__}: {str(problem).splitlines()[:1]}"
            )
            continue
        if peer != "base_only" and not error < TOLERANCE[dtype]:
            raise SystemExit(f"{name} T={rows}: {peer} differs from visionllm by {error}")
        forms[peer] = form
        differentiable += [peer] if has_backward else []
    leaves = [t for t in (inputs.x, inputs.lora_a, inputs.lora_b) if t is not None]
    grad_output = torch.randn_like(expected).to(dtype)

    def forward(form: Form) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return form()

        return call

    def both(form: Form) -> Callable[[], object]:
        return lambda: torch.autograd.grad(form(), leaves, grad_output)

    label = f"{name} T={rows} {str(dtype).removeprefix('torch.')}"
    counts = dict.fromkeys(forms, repeats)
    functions = {peer: forward(form) for peer, form in forms.items()}
    result = compare(f"{label} forward", functions, work(inputs, False), limits, counts, device)
    if case.backward:
        functions = {peer: both(forms[peer]) for peer in differentiable}
        result += compare(f"{label} forward+backward", functions, work(inputs, True), limits, counts, device)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_device_option(parser)
    parser.add_argument("--rows", nargs="+", type=int, help="numbers of rows of x")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="(default: bfloat16 on CUDA, float32 on the CPU)"
    )
    parser.add_argument("--repeats", type=int, default=20, help="calls of each (default %(default)s)")
    options = parser.parse_args()
    device = require_device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    limits = measure_limits(device, dtype)
    rows = []
    for name in options.cases:
        for count in options.rows or ROWS[device.type]:
            new = run_case(name, count, dtype, device, limits, options.repeats)
            print_rows(new)
            rows += new
    threads = f"_{torch.get_num_threads()}_threads" if device.type == "cpu" else ""
    path = write_results(results_name("lora_linear", device) + threads, rows, {str(dtype): limits}, device)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
