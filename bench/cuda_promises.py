"""What each CUDA kernel's design promises of its machine code; bench/cuda_static.py holds the compiler to it.

Every kernel has to match exactly one entry, so that none is forgotten. No entry may excuse spilled registers
without saying why that does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["PROMISES", "Promise", "promise_of"]


@dataclass(frozen=True)
class Promise:
    kernels: (
        str  # regular expression of the whole name, with its template arguments: "low_rank_kernel<fp16.*"
    )
    operator: str
    loads_16: bool = False  # its global loads of bulk data are 16 bytes wide
    tensor: bool = False  # multiplies on tensor cores
    # Bytes a block asks for at launch, at most at the model's sizes; groups of `kernels` are at hand.
    dynamic_shared: int | Callable[[re.Match[str]], int] = 0
    adapts: bool = False  # asks for less where a chip has less
    stack: str = ""  # why it may use a stack frame; "" for: it may not

    def dynamic_shared_of(self, kernel: str) -> int:
        match = re.fullmatch(self.kernels, kernel)
        if match is None:
            raise LookupError(f"{kernel} is none of {self.kernels}")
        return self.dynamic_shared(match) if callable(self.dynamic_shared) else self.dynamic_shared

    def broken_by(self, counts: dict[str, int], stack: int) -> list[str]:
        """What of it the machine code does not keep."""
        problems = []
        if self.loads_16 and not counts["loads_16"]:
            problems.append("has no 16-byte global load")
        if self.tensor and not counts["tensor"]:
            problems.append("has no tensor-core instruction")
        if not self.stack and stack:
            problems.append(f"has a stack frame of {stack} bytes a thread")
        if not self.stack and counts["local"]:
            problems.append(f"accesses local memory in {counts['local']} places")
        return problems


PROMISES: tuple[Promise, ...] = ()


def promise_of(kernel: str) -> Promise:
    """The one entry for a kernel.

    Raises:
        LookupError: none, or more than one.
    """
    found = [p for p in PROMISES if re.fullmatch(p.kernels, kernel)]
    if len(found) != 1:
        raise LookupError(
            f"bench/cuda_promises.py has {len(found)} entries for the kernel {kernel}, expected 1"
        )
    return found[0]
