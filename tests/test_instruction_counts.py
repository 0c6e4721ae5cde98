"""bench/instruction_counts.py: it builds, counts what the committed table has, and sees a change."""

from __future__ import annotations

import json
from pathlib import Path

import instruction_counts
import pytest

TABLE = json.loads((instruction_counts.ROOT / "bench/results/instruction_counts.json").read_text())
OPERATORS = ("fusion_attention", "lora_linear", "ms_deform_attn", "query_attention", "slot_head")


def test_every_operator_is_recorded_forward_and_backward() -> None:
    counts = TABLE["counts"]
    for operator in OPERATORS:
        names = [case for case in counts if case.startswith(operator)]
        assert any("backward" in case for case in names), operator
        assert any("backward" not in case for case in names), operator
    for case, by_isa in counts.items():
        assert set(by_isa) == set(instruction_counts.ISAS), case
        # Vectors of eight: a loop that lost them would come near the count without vectors.
        assert by_isa["avx2"] < 0.7 * by_isa["scalar"], case


@pytest.mark.parametrize("factor, problem", [(1.01, False), (1.03, True), (0.97, True)])
def test_a_change_is_named(factor: float, problem: bool) -> None:
    before = {"a": {"avx2": 1000000}}
    problems = instruction_counts.differences(before, {"a": {"avx2": int(1000000 * factor)}})
    assert [p.split(":")[0] for p in problems] == (["a on avx2"] if problem else [])


def test_a_case_that_is_not_recorded_is_named() -> None:
    assert "none recorded" in instruction_counts.differences({}, {"b": {"scalar": 7}})[0]


def test_counts_a_case(tmp_path: Path) -> None:
    """The same number twice, whatever else the machine does."""
    if tool := instruction_counts.missing_tool():
        pytest.skip(f"{tool} is not installed")
    driver = instruction_counts.build(tmp_path)
    cases = {case.name: case for case in instruction_counts.list_cases(driver)}
    assert set(TABLE["counts"]) <= set(cases)
    case = cases["ms_deform_attn"]
    first, second = (instruction_counts.count(driver, case.name, "avx2") for _ in range(2))
    assert first is not None and second is not None
    assert abs(first / second - 1) < 1e-3
    assert first > case.units  # each row takes more than one instruction
    with pytest.raises(RuntimeError, match="no such case"):
        instruction_counts.count(driver, "nothing", "avx2")
