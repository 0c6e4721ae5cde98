"""Tables of experiments, and the verdict on the paper's ordering."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionllm.reproduce import paper
from visionllm.reproduce.ablations import best_verdict, sequence_verdict
from visionllm.reproduce.table import Row, Table, ordering, seed_means, write_overview


def rows(ours, theirs, errors=None):
    errors = errors or [{}] * len(ours)
    return [
        Row(f"row {k}", {"AP": a}, {"AP": b}, error)
        for k, (a, b, error) in enumerate(zip(ours, theirs, errors, strict=True))
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "answer"),
    [
        ([10.0, 20.0, 30.0], [1.0, 2.0, 3.0], "holds**: 3 of 3"),
        ([30.0, 20.0, 10.0], [1.0, 2.0, 3.0], "does not hold**: 0 of 3"),
        ([10.0, 30.0, 20.0], [1.0, 2.0, 3.0], "holds in part**: 2 of 3"),
        ([10.0, 10.4, 20.0], [1.0, 2.0, 3.0], "holds as far as it is decided**: 2 of 3"),
        ([10.0, 10.4], [1.0, 2.0], "is not decided**: 0 of 1"),
        ([10.0, None], [1.0, 2.0], "is not decided**: 0 of 1"),
    ],
)
def test_the_verdict_counts_pairs(ours, theirs, answer):
    assert f"The paper's ordering by AP {answer} pairs agree" in ordering(rows(ours, theirs), "AP", 1.0)


def test_pairs_that_the_paper_does_not_tell_apart_say_nothing():
    assert ordering(rows([1.0, 50.0], [44.8, 44.7]), "AP", 1.0) == ""
    assert ordering([Row("a", {"AP": 1.0}), Row("b", {"AP": 2.0})], "AP", 1.0) == ""


def test_seeds_that_disagree_decide_nothing():
    errors = [{"AP": 3.0}, {"AP": 4.0}]
    assert "not decided" in ordering(rows([10.0, 19.9], [1.0, 2.0], errors), "AP", 1.0)
    assert "holds**" in ordering(rows([10.0, 20.1], [1.0, 2.0], errors), "AP", 1.0)


def test_the_verdict_names_the_pairs_that_are_the_other_way_round():
    verdict = ordering(rows([10.0, 30.0, 20.0], [1.0, 2.0, 3.0]), "AP", 1.0)
    assert "the other way round: row 1 < row 2." in verdict


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=6))
def test_means_over_seeds(values):
    means, errors = seed_means([{"AP": value} for value in values])
    assert means["AP"] == pytest.approx(statistics.fmean(values), abs=1e-9)
    if len(values) == 1:
        assert errors == {}
    else:
        assert errors["AP"] == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)


def test_a_number_that_one_seed_lacks_has_no_mean():
    assert seed_means([{"AP": 1.0, "APs": None}, {"AP": 3.0, "APs": 5.0}])[0] == {"AP": 2.0, "APs": None}


def test_a_table_stands_beside_the_papers(tmp_path):
    table = Table(
        "T3b",
        "what image tokens are",
        [
            Row("average pooling", {"AP": 12.34, "AP50": None}, {"AP": 23.1}, {"AP": 0.26}, "100 steps"),
            Row("queries", {"AP": 30.0, "AP50": 50.0}, {"AP": 44.8}),
        ],
        verdict="**It holds**.",
        notes=["A note."],
        settings={"seeds": [0, 1], "minutes": 5},
        commands=["visionllm reproduce T3b"],
    )
    table.write(tmp_path / "T3b")
    lines = (tmp_path / "T3b" / "table.md").read_text().splitlines()
    assert lines[0] == "# T3b: what image tokens are"
    start = lines.index("| variant | AP | AP50 | paper: AP |  |")
    assert lines[start + 1] == "|---|---:|---:|---:|---|"
    assert lines[start + 2] == "| average pooling | 12.3 ± 0.3 | – | 23.1 | 100 steps |"
    assert lines[start + 3] == "| queries | 30.0 | 50.0 | 44.8 |  |"
    assert "visionllm reproduce T3b" in lines and "seeds: 0, 1; minutes: 5." in lines
    content = json.loads((tmp_path / "T3b" / "table.json").read_text())
    assert content["rows"][0] == {
        "name": "average pooling",
        "ours": {"AP": 12.34, "AP50": None},
        "error": {"AP": 0.26},
        "paper": {"AP": 23.1},
        "note": "100 steps",
    }
    write_overview(tmp_path)
    overview = (tmp_path / "README.md").read_text()
    assert "| [T3b](T3b/table.md) | what image tokens are | **It holds**. |" in overview


def test_numbers_that_are_not_finite_are_dashes(tmp_path):
    table = Table("x", "y", [Row("a", {"AP": math.nan})])
    table.write(tmp_path)
    assert "| a | – |" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "table.json").read_text())["rows"][0]["ours"] == {"AP": None}


def test_the_papers_tables_agree_with_each_other():
    """R50 trained on all tasks stands in T1, T2a and T2b; the detector of the ablations in six tables."""
    assert paper.T1["detection, AP"]["paper R50"] == paper.T2A["80"]["AP"]
    assert paper.T1["detection, AP50"]["paper R50"] == paper.T2A["80"]["AP50"]
    assert paper.T1["segmentation, mask AP75"]["paper R50"] == paper.T2B["24"]["AP75"]
    ablations = [
        paper.T3A["trained"],
        paper.T3B["queries"],
        paper.T3C["1025"],
        paper.T4B["LoRA, randomness"],
        paper.T4C["100"],
        paper.T4D["queries in parallel"],
        paper.T4E["80"],
        paper.T4A["++ random categories"],
    ]
    assert {row["AP"] for row in ablations} == {44.8}


@pytest.mark.parametrize(("sequence", "answer"), [(1.0, "finding holds"), (9.0, "does not hold")])
def test_whether_a_sequence_converges(sequence, answer):
    rows = [Row("sequence", {"AP": sequence}), Row("parallel", {"AP": 20.0})]
    assert answer in sequence_verdict(rows) and f"{sequence:.1f} AP token by token, 20.0" in sequence_verdict(
        rows
    )


def test_the_best_of_several():
    rows = [Row("a", {"AP": 10.0}), Row("b", {"AP": 14.0}), Row("c", {"AP": 11.0})]
    assert best_verdict(rows).startswith("**“b” is the best**: 14.0 AP, 3.0 points")
    unsure = [Row("a", {"AP": 10.0}, error={"AP": 2.0}), Row("b", {"AP": 13.0}, error={"AP": 1.0})]
    assert "“b” is not told apart from “a”" in best_verdict(unsure)
