"""Choice of bfloat16 autocast: what the CPU can do, as torch says or, before it did, the kernel."""

from __future__ import annotations

import pytest
import torch

from visionllm.ops import precision
from visionllm.ops.precision import cpu_instructions, use_autocast

CPU = torch.device("cpu")
LINES = "processor\t: 0\nflags\t\t: fpu avx2 {}\nbugs\t\t: amx_tile\n\nprocessor\t: 1\nflags\t\t: amx_bf16\n"


@pytest.mark.parametrize(
    ("more", "expected"), [("avx512_bf16", True), ("amx_tile fma", True), ("fma", False)]
)
def test_without_a_word_from_torch_the_kernel_knows(monkeypatch, tmp_path, more, expected):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    (tmp_path / "cpuinfo").write_text(LINES.format(more))
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "cpuinfo")
    assert cpu_instructions() == {"fpu", "avx2", *more.split()}
    assert use_autocast("auto", CPU) is expected
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "missing")
    assert cpu_instructions() == set()
    assert use_autocast("auto", CPU) is False


@pytest.mark.parametrize("has", [True, False])
def test_torch_is_asked_first(monkeypatch, has):
    known = {"avx2": True, "avx512_bf16": has, "amx_tile": False, "architecture": "x86_64"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert cpu_instructions() == {"avx2"} | ({"avx512_bf16"} if has else set())
    assert use_autocast("auto", CPU) is has


def test_a_choice_is_obeyed(monkeypatch):
    monkeypatch.setattr(precision, "cpu_instructions", set)
    assert use_autocast("on", CPU) is True
    monkeypatch.setattr(precision, "cpu_instructions", lambda: {"amx_bf16"})
    assert use_autocast("off", CPU) is False
