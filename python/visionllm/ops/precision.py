"""Whether bfloat16 is worth it on a device."""

from __future__ import annotations

from pathlib import Path

import torch

# Instructions that multiply bfloat16, as torch and the Linux kernel name them.
BFLOAT16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "amx_tile"})
CPU_INFO = Path("/proc/cpuinfo")


def use_autocast(choice: str, device: torch.device) -> bool:
    """Whether to train in bfloat16 autocast. "auto": on CUDA and on CPUs that multiply bfloat16."""
    if choice != "auto":
        return choice == "on"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return not BFLOAT16_INSTRUCTIONS.isdisjoint(cpu_instructions())


def cpu_instructions() -> set[str]:
    """Names of what this CPU can do; none where neither torch nor the kernel says so."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # torch 2.6 has no such function
    if capabilities is not None:
        return {name for name, present in capabilities().items() if present is True}
    try:
        lines = CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
