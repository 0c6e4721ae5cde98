"""From a source's tensor names to a model's: rules, and an account in which no tensor is left over.

steps = plan(source.shapes, shapes_of(module), RULES, where)   # raises before anything is read
fill(module, source, steps, where)                             # one tensor in memory at a time
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from visionllm.convert.source import Source

Shape = tuple[int, ...]
SHOWN = 20  # differences of each kind that an error lists


class ConvertError(ValueError):
    """A source that does not fit: tensors missing, unused, or of another shape or type, or broken files."""


@dataclass(frozen=True)
class Rule:
    """Where a source's tensors go.

    Attributes:
        pattern: regular expression that a source's whole name must match. A name that several rules match
            goes to all of their targets (a packed tensor is taken apart so).
        target: template of the name here, with the pattern's groups (``\\1``); None: known, and not used.
        transform: what to do to the tensor first. Its result's shape is checked by running it on a tensor
            without memory (device "meta"), so it may look at shapes only.
        why: of a rule without target, for people to read.
    """

    pattern: str
    target: str | None
    transform: Callable[[Tensor], Tensor] | None = None
    why: str = ""


@dataclass(frozen=True)
class Step:
    """One tensor's way: read ``source``, transform it, store it as ``target``."""

    source: str
    target: str
    transform: Callable[[Tensor], Tensor] | None = None


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """Of everything in its state dict."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def plan(
    source: Mapping[str, Shape],
    target: Mapping[str, Shape],
    rules: Sequence[Rule],
    where: str,
    optional: Collection[str] = (),
) -> list[Step]:
    """A step for every target, in the source's order.

    Args:
        source, target: names and shapes.
        where: what an error calls the source, usually its path.
        optional: regular expressions of whole target names that a source may lack: they keep the values they
            have.

    Raises:
        ConvertError: listing targets that nothing fills or that two tensors fill, source tensors that no rule
            knows or whose target the model does not have, and tensors of another shape.
    """
    steps: list[Step] = []
    filled_by: dict[str, str] = {}
    unused, wrong, twice = [], [], []
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    for name, shape in source.items():
        known = False
        for pattern, rule in compiled:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            known = True
            if rule.target is None:
                continue
            to = match.expand(rule.target)
            if to not in target:
                unused.append(f"{name} (there is no {to} here)")
                continue
            if to in filled_by:
                twice.append(f"{to}: by {filled_by[to]} and by {name}")
                continue
            filled_by[to] = name
            steps.append(Step(name, to, rule.transform))
            problem = _shape_problem(tuple(shape), tuple(target[to]), rule.transform)
            if problem:
                wrong.append(f"{name} → {to}: {problem}")
        if not known:
            unused.append(name)
    may_lack = [re.compile(pattern) for pattern in optional]
    missing = [
        name
        for name in target
        if name not in filled_by and not any(pattern.fullmatch(name) for pattern in may_lack)
    ]
    _raise_if_any(
        where,
        {"missing": missing, "unused": unused, "of another shape": wrong, "filled twice": twice},
    )
    return steps


def _shape_problem(shape: Shape, expected: Shape, transform: Callable[[Tensor], Tensor] | None) -> str | None:
    """What is wrong with a tensor of this shape, if anything."""
    got = shape
    if transform is not None:
        try:
            got = tuple(transform(torch.empty(shape, device="meta")).shape)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            return f"expected a shape that becomes {list(expected)}, got {list(shape)}: {first_line}"
    if got == expected:
        return None
    before = f" (from {list(shape)})" if got != shape else ""
    return f"expected shape {list(expected)}, got {list(got)}{before}"


def _raise_if_any(where: str, problems: Mapping[str, Sequence[str]]) -> None:
    found = {kind: names for kind, names in problems.items() if names}
    if not found:
        return
    lines = [f"{where}: " + ", ".join(f"{len(names)} {kind}" for kind, names in found.items())]
    for kind, names in found.items():
        more = f" (the first {SHOWN} of {len(names)})" if len(names) > SHOWN else ""
        lines.append(f"{kind}{more}:")
        lines += [f"  {name}" for name in names[:SHOWN]]
    raise ConvertError("\n".join(lines))


def convert(
    source: Source, steps: Sequence[Step], where: str, integers: Mapping[str, torch.dtype] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Target names and tensors, each read when it is asked for, in the source's type.

    Args:
        integers: targets that are not of floating point, and their types.

    Raises:
        ConvertError: a tensor is not of floating point, or not finite; the message names it.
    """
    for step in steps:
        tensor = source.read(step.source)
        expected = (integers or {}).get(step.target)
        if expected is not None:
            if tensor.dtype != expected:
                raise ConvertError(f"{where}: {step.source}: expected {expected}, got {tensor.dtype}")
        elif not tensor.is_floating_point():
            raise ConvertError(f"{where}: {step.source}: expected floating point, got {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise ConvertError(f"{where}: {step.source}: not finite")
        yield step.target, tensor if step.transform is None else step.transform(tensor)


@torch.no_grad()
def fill(module: nn.Module, source: Source, steps: Sequence[Step], where: str) -> None:
    """Copies the steps' tensors into the module's, in the module's types.

    A module on the device "meta" gets the tensors themselves, in the source's type, contiguous.

    Raises:
        ConvertError: as `convert`.
    """
    state = module.state_dict(keep_vars=True)
    integers = {name: one.dtype for name, one in state.items() if not one.is_floating_point()}
    for name, tensor in convert(source, steps, where, integers):
        if state[name].is_meta:
            # Its own memory: a source's tensor may be a view of a file.
            own = tensor.clone(memory_format=torch.contiguous_format)
            module.load_state_dict({name: own}, strict=False, assign=True)
        else:
            state[name].copy_(tensor)
