"""Calls past torch's dispatcher, which takes longer than a small layer.

An operator that is registered with torch costs about 9 µs of Python a call on its way to the CPU's function,
and 35 µs more where autograd records it. The same functions are called by hand here where nothing could tell
the difference: on plain CPU tensors, while no mode, transform, tracer or profiler looks at operators. Then
autograd records one node with the functions that are registered for the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import profiler

__all__ = ["past_dispatcher"]

_PLAIN = (Tensor, torch.nn.Parameter)


def past_dispatcher(
    operator: str,
    cpu: Callable[..., Any],
    setup_context: Callable[[Any, tuple, Any], None] | None = None,
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
) -> Callable[..., Any]:
    """A function that does what ``torch.ops.visionllm.<operator>`` does, in less time where it can.

    Args:
        operator: registered already; its arguments are tensors, None and numbers, all given by position.
        cpu: what is registered for the CPU.
        setup_context, backward: what is registered for autograd, if calls that it records are to be fast too.
            Only the first output is differentiable.
    """
    registered = getattr(torch.ops.visionllm, operator)
    record = None
    if setup_context is not None and backward is not None:
        record = _function(operator, cpu, setup_context, backward).apply

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _observed():
            return registered(*arguments)
        recording = torch.is_grad_enabled()
        wanted = False
        for argument in arguments:
            if type(argument) in _PLAIN:
                if not argument.is_cpu:
                    return registered(*arguments)
                if recording and argument.requires_grad:
                    wanted = True
            elif isinstance(argument, Tensor):  # a subclass may want to see the operator
                return registered(*arguments)
        if not wanted:
            return cpu(*arguments)
        return registered(*arguments) if record is None else record(*arguments)

    return call


def _observed() -> bool:
    """Whether a mode (fake tensors, counters, make_fx), a transform (vmap), a tracer or a profiler is on."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or torch._C._is_torch_function_mode_enabled()
        or torch.jit.is_tracing()
        or profiler._is_profiler_enabled
    )


def _function(
    operator: str,
    cpu: Callable[..., Any],
    setup_context: Callable[[Any, tuple, Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *arguments: Any) -> Any:
        output = cpu(*arguments)
        setup_context(ctx, arguments, output)
        ctx.set_materialize_grads(False)  # no zeros for outputs without gradient
        return output

    def backward_of_one(ctx: Any, grad_output: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, grad_output, *others)

    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_one)}
    return type(operator, (torch.autograd.Function,), functions)
