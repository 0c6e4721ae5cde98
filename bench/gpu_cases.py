"""Every operator once at small, awkward sizes, forward and backward, held against its float64 reference.

    python bench/gpu_cases.py [--device cuda] [--types float32 bfloat16 float16]

It is what compute-sanitizer watches (bench/gpu_check.sh): inputs come from the host, results are compared
there, and little but our own kernels runs on the device. The tests proper are in tests/.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from harness import add_device_option, require_device
from torch import Tensor

# ||out - reference|| / ||reference||: rounding of outputs, and of what is kept between the kernels' steps.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    file: str  # module of visionllm.ops
    operator: str  # name of the function; on the CPU, in float64, it computes its reference
    options: dict[str, Any]

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"visionllm.ops.{self.file}")

    def run(self, inputs: Any) -> Iterator[tuple[str, Tensor]]:
        """The outputs and, where inputs ask for gradients, those of a random sum of the outputs."""
        function: Callable = getattr(self.module, self.operator)
        result = _SPELLED_OUT.get(self.operator, lambda f, i: f(*i.args()))(function, inputs)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        for i, output in enumerate(outputs):
            yield f"output {i}", output
        leaves = {n: t for n, t in _tensors(inputs).items() if t.requires_grad}
        smooth = [output for output in outputs if output.requires_grad]
        if not leaves or not smooth:
            return
        random = torch.Generator().manual_seed(1)
        grads = [torch.randn(output.shape, generator=random).to(output) for output in smooth]
        found = torch.autograd.grad(smooth, list(leaves.values()), grads, allow_unused=True)
        for name, grad in zip(leaves, found, strict=True):
            if grad is not None:
                yield f"gradient of {name}", grad


def _predict(function: Callable, inputs: Any) -> list[Tensor]:
    given = {name: getattr(inputs, name) for name in ("valid", "epsilon", "scale", "window", "offset")}
    result = function(inputs.states, inputs.rows, norm_weight=inputs.norm_weight, probabilities=True, **given)
    return [result.probability, result.logsumexp, result.expectation, result.probabilities]


def _cross_entropy(function: Callable, inputs: Any) -> Tensor:
    given = {name: getattr(inputs, name) for name in ("weight", "valid", "norm_weight", "epsilon", "scale")}
    return function(inputs.states, inputs.rows, inputs.target, sigma=inputs.sigma or None, **given)


# Operators that are not called with the arguments in order.
_SPELLED_OUT = {"slot_head_predict": _predict, "slot_head_cross_entropy": _cross_entropy}

CASES = (
    Case("ms_deform_attn", "ms_deform_attn", dict(queries=5, heads=3, channels=24, points=3)),
    Case("ms_deform_attn", "ms_deform_attn", dict(queries=70, heads=2, channels=32)),
    Case("ms_deform_attn_fused", "ms_deform_attn_fused", dict(queries=5, heads=3, channels=24, points=3)),
    Case("ms_deform_attn_fused", "ms_deform_attn_fused", dict(queries=70, heads=2, boxes=True)),
    Case("lora_linear", "lora_linear", dict(rows=3, inputs=72, outputs=40)),
    Case("lora_linear", "lora_linear", dict(rows=133, inputs=72, outputs=200, rank=16)),
    Case("lora_linear", "lora_linear", dict(rows=37, adapters=3, indexed=True)),
    Case("lora_linear", "lora_linear", dict(rows=9, int8=True)),
    Case("fusion_attention", "fusion_attention", dict(positions=37, tokens=11)),
    Case("fusion_attention", "fusion_attention", dict(batch=1, positions=70, tokens=33)),
    Case("query_attention", "query_attention", dict()),
    Case("query_attention", "query_attention", dict(groups=3, slots=9, prefix=70, lengths=(70, 1, 33))),
    Case("slot_head_predict", "slot_head_predict", dict(located=True)),
    Case("slot_head_cross_entropy", "slot_head_cross_entropy", dict()),
    Case("slot_head_cross_entropy", "slot_head_cross_entropy", dict(located=True, rows=130)),
)


def _tensors(inputs: Any) -> dict[str, Tensor]:
    values = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _moved(inputs: Any, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
    """The same numbers elsewhere, or all floating-point ones in another type; leaves stay leaves."""

    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        moved = value.detach().to(device=device, dtype=dtype if value.is_floating_point() else None)
        return moved.requires_grad_(value.requires_grad)

    return dataclasses.replace(
        inputs, **{f.name: move(getattr(inputs, f.name)) for f in dataclasses.fields(inputs)}
    )


def error_of(output: Tensor, reference: Tensor) -> float:
    """||output - reference|| / ||reference||; NaN where either is NaN and the other is not the same."""
    output, reference = output.detach().cpu().double(), reference.detach().double()
    if output.shape != reference.shape:
        return float("nan")
    return float((output - reference).norm() / reference.norm().clamp(min=1e-30))


def run_case(case: Case, dtype: torch.dtype, device: torch.device) -> list[str]:
    """What differs from the reference."""
    inputs = case.module.sample_inputs("cpu", dtype, requires_grad=True, **case.options)
    results = list(case.run(_moved(inputs, device=device)))
    expected = list(case.run(_moved(inputs, dtype=torch.float64)))
    if [name for name, _ in results] != [name for name, _ in expected]:
        return [f"gives {[name for name, _ in results]}, the reference {[name for name, _ in expected]}"]
    problems = []
    for (name, value), (_, reference) in zip(results, expected, strict=True):
        error = error_of(value, reference)
        if not error <= TOLERANCE[dtype]:
            problems.append(f"{name} is off by {error:.2e}, at most {TOLERANCE[dtype]:.0e}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_device_option(parser)
    parser.add_argument("--types", nargs="+", default=[str(t).removeprefix("torch.") for t in TOLERANCE])
    options = parser.parse_args()
    device = require_device(options.device)
    failures = 0
    for case in CASES:
        for dtype in (getattr(torch, name) for name in options.types):
            problems = run_case(case, dtype, device)
            failures += bool(problems)
            text = "; ".join(problems) or "as the reference"
            print(f"{case.operator} {case.options} {dtype}: {text}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
