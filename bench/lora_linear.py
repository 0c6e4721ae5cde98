"""A linear layer with low-rank adapters beside its peers, forward and with backward, at the paper's sizes.

    python bench/lora_linear.py [--threads 1 2] [--types float32 bfloat16] [--features 4096 192]
    python bench/lora_linear.py --device cuda [--rows 1 64 ...] [--cases base int8 mixed] [--repeats 20]

Peers: the bare layer without adapter (the yardstick: what the adapter costs), the layer and addmm, the four
operations of PEFT's layer by themselves, torch.compile of addmm (CUDA: on the CPU it takes long to compile),
and, where they are installed, PEFT, LoRAFusion and punica. Each result is held against ours first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
from torch import Tensor, nn
from torch.nn import functional

from visionllm.ops import lora_linear
from visionllm.ops.lora_linear import SampleInputs, sample_inputs

ROWS = {"cuda": (1, 64, 313, 500, 900, 4900), "cpu": (1, 64, 500, 1024)}
# LLaMA-7B's width, and the packaged model's.
FEATURES = {"cuda": (4096,), "cpu": (4096, 192)}
RANK = 16
CALLS = 20
# Largest error of a peer against ours, over the largest output.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Form = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    options: dict
    backward: bool


CASES = {
    "plain": Case(dict(adapters=0), False),
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


def separate(inputs: SampleInputs) -> Form:
    """What PEFT's layer computes, without what it looks up on the way."""
    x, weight, _, lora_a, lora_b, scale, *_ = inputs.args()
    assert lora_a is not None and lora_b is not None

    def call() -> Tensor:
        term = functional.linear(functional.linear(x, lora_a[0]), lora_b[0])
        return functional.linear(x, weight) + term * float(scale)

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
    "plain": {"base_only": (base_only, False)},
    "base": {
        "base_only": (base_only, False),
        "addmm": (addmm, True),
        "separate": (separate, True),
        "compiled_addmm": (compiled_addmm, True),
        "peft": (peft, False),
        "lorafusion": (lorafusion, True),
        "punica": (punica, False),
    },
    "int8": {"dequantised": (int8_dequantised, False)},
    "mixed": {"base_only": (base_only, False), "by_adapter": (by_adapter, True), "punica": (punica, False)},
}


ONLY_CUDA = ("compiled_addmm", "lorafusion", "punica")


def work(inputs: SampleInputs, backward: bool) -> Work:
    """Forward: each operand once. Backward: the gradients of x, A and B, for which all is read again."""
    x, weight, _, lora_a, lora_b, *_ = inputs.args()
    rows, outputs = x.shape[0], weight.shape[0]
    adapters = [] if lora_a is None or lora_b is None else [lora_a, lora_b]
    forward = [x, weight, *adapters]
    rank = 0 if lora_a is None else lora_a.shape[1]
    size = sum(t.numel() * t.element_size() for t in forward) + rows * outputs * x.element_size()
    base = 2 * rows * outputs * x.shape[1]
    adapter = 2 * rows * rank * (x.shape[1] + outputs)
    if backward:
        written = sum(t.numel() for t in (x, *adapters)) * x.element_size()
        return Work(2 * size + written, 2 * base + 3 * adapter)
    return Work(size, base + adapter)


def run_case(
    name: str,
    rows: int,
    features: int,
    dtype: torch.dtype,
    device: torch.device,
    limits: Limits,
    repeats: int | None,
) -> list[Row]:
    case = CASES[name]
    if repeats is None:  # on the CPU the largest calls take half a second
        repeats = 20 if device.type == "cuda" else max(3, min(40, int(2e10 / (rows * features**2))))
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
        expected = forms["visionllm"]()
    differentiable = ["visionllm"]
    for peer, (make, has_backward) in FORMS[name].items():
        if peer in ONLY_CUDA and device.type == "cpu":
            continue
        try:
            form = make(inputs)
            with torch.no_grad():
                error = relative_error(form(), expected)
        except Exception as problem:  # a peer that is not installed, or not for this device, type or size
            print(f"{name} T={rows} K={features}: without {peer}: {reason(problem)}")
            continue
        if peer != "base_only" and not error < TOLERANCE[dtype]:
            raise SystemExit(f"{name} T={rows}: {peer} differs from visionllm by {error}")
        forms[peer] = form
        differentiable += [peer] if has_backward else []
    leaves = [t for t in (inputs.x, inputs.lora_a, inputs.lora_b) if t is not None]
    grad_output = torch.randn_like(expected)

    # A small layer on the CPU finds its weights in the cache: several calls are timed as one.
    calls = CALLS if device.type == "cpu" and features < 1024 else 1

    def repeated(form: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            for _ in range(calls):
                form()

        return call

    def total(one: Work) -> Work:
        return Work(calls * one.bytes, calls * one.flops)

    label = f"{name} T={rows} K={features} {type_name(dtype)}"
    label += f" x {calls}" if calls > 1 else ""
    counts = dict.fromkeys(forms, repeats)
    functions = {peer: without_grad(repeated(form)) for peer, form in forms.items()}
    result = compare(f"{label} forward", functions, total(work(inputs, False)), limits, counts, device)
    if case.backward:
        functions = {
            peer: repeated(with_backward(forms[peer], leaves, grad_output)) for peer in differentiable
        }
        result += compare(
            f"{label} forward+backward", functions, total(work(inputs, True)), limits, counts, device
        )
    return result


def main() -> None:
    parser = operator_parser(__doc__, "lora_linear", CASES, "(default: 20, on the CPU by size)")
    parser.add_argument("--rows", nargs="+", type=int, help="numbers of rows of x")
    parser.add_argument("--features", nargs="+", type=int, help="inputs and outputs of the layer")
    options = parser.parse_args()
    device = require_device(options.device)

    def measurement(features: int, name: str, dtype: torch.dtype, rows: int) -> Measurement:
        return Measurement(
            dtype, lambda limits: run_case(name, rows, features, dtype, device, limits, options.repeats)
        )

    measurements = [
        measurement(features, name, dtype, rows)
        for features in options.features or FEATURES[device.type]
        for name in options.cases or CASES
        for dtype in chosen_types(options, device)
        for rows in options.rows or ROWS[device.type]
    ]
    run_measurements(options, device, measurements, limits_name=str)


if __name__ == "__main__":
    main()
