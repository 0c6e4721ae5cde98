"""Formats in words: the share that the model writes rightly, counted the whole way."""

from __future__ import annotations

import json

import pytest
from colour_network import ColourNetwork

from visionllm import cli
from visionllm.evaluate.formats import evaluate_formats
from visionllm.instruction import format_text
from visionllm.instruction.format_phrasings import evaluation_phrasings
from visionllm.pipeline import VisionLLM


class Writer(ColourNetwork):
    """Writes the format of every phrasing whose text it knows, another one elsewhere."""

    def __init__(self, known, otherwise):
        super().__init__()
        self.known, self.otherwise = known, otherwise

    def write_format(self, texts):
        return [self.known.get(text, self.otherwise) for text in texts]


RIGHT = {one.text: one.format for one in evaluation_phrasings()}
BOXES = sum(one.points == 2 for one in evaluation_phrasings())


def test_everything_right():
    progress = []
    found = evaluate_formats(VisionLLM(Writer(RIGHT, "")), done=progress.append).to_dict()
    assert found == {
        "phrasings": len(RIGHT), "exact": 1.0, "exact_boxes": 1.0, "exact_points": 1.0, "malformed": 0,
    }  # fmt: skip
    assert sum(progress) == len(RIGHT)


def test_always_a_box():
    found = evaluate_formats(VisionLLM(Writer({}, format_text(2)))).to_dict()
    assert found["exact_boxes"] == 1.0 and found["exact_points"] == 0.0
    assert found["exact"] == pytest.approx(BOXES / len(RIGHT)) and 0 < BOXES < len(RIGHT)


def test_what_cannot_be_read_is_counted_alone():
    """One of a batch: the others are understood."""
    wrong = dict(RIGHT)
    wrong[next(iter(wrong))] = "(c, x1"
    found = evaluate_formats(VisionLLM(Writer(wrong, "")), batch_size=4)
    assert found.to_dict()["malformed"] == 1 and found.formats[0].said == ""
    assert "for which the model wrote `(c, x1`" in found.formats[0].error
    assert sum(one.said == one.right for one in found.formats) == len(RIGHT) - 1


def test_the_command(tmp_path, monkeypatch, capsys):
    model = VisionLLM(Writer({}, format_text(2)))
    monkeypatch.setattr("visionllm.pipeline.load", lambda *_: model)
    assert cli.main(["evaluate", "--task", "formats", "--output", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["task"] == "formats" and metrics["exact_boxes"] == 1.0
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == metrics["phrasings"]
    assert "right: '(c, x1, y1, x2, y2, ..., x" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--task", "formats", "--scenes", "val", "--output", str(tmp_path)])
    assert "--task formats takes no pictures, got --scenes" in capsys.readouterr().err
