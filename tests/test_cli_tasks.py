"""``visionllm predict`` for every task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from colour_network import ColourNetwork, picture
from PIL import Image

import visionllm.pipeline
from visionllm.cli import main
from visionllm.text_options import TextOptions

UNKNOWN = (
    'Look at <image>. For every animal of {"red": <c0>} give me its label followed by its top-left and '
    "bottom-right corner."
)


@pytest.fixture(autouse=True)
def network(monkeypatch) -> ColourNetwork:
    network = ColourNetwork()
    monkeypatch.setattr(
        visionllm.pipeline, "load", lambda model="tiny", device=None: visionllm.pipeline.VisionLLM(network)
    )
    return network


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    Image.fromarray(picture(red=(16, 8, 48, 40), blue=(80, 16, 112, 64))).save(paths[0])
    Image.fromarray(picture(blue=(80, 16, 112, 64))).save(paths[1])
    return [str(path) for path in paths]


def run(pictures: list[str], tmp_path: Path, *arguments: str) -> dict:
    assert main(["predict", *pictures, *arguments, "--output", str(tmp_path / "out")]) == 0
    return json.loads((tmp_path / "out" / "predictions.json").read_text())


def test_segment(pictures, tmp_path):
    written = run(pictures, tmp_path, "--classes", "blue,red", "--segment", "--points", "12")
    assert written["task"] == "segmentation" and written["format_source"] == "grammar"
    assert [len(entry["boxes"]) for entry in written["pictures"]] == [2, 1]
    assert len(written["pictures"][0]["boxes"][0]["polygon"]) == 24
    assert "spread" not in written["pictures"][0]["boxes"][0]
    written = run(pictures, tmp_path, "--classes", "red", "--segment", "--spread")
    assert len(written["pictures"][0]["boxes"][0]["spread"]) == 32, "16 points by default"


def test_keypoints(pictures, tmp_path):
    written = run(pictures, tmp_path, "--classes", "red", "--keypoints", "top left, center")
    assert written["task"] == "keypoints"
    assert list(written["pictures"][0]["boxes"][0]["keypoints"]) == ["top left", "center"]


def test_ground(pictures, tmp_path, capsys):
    written = run(pictures, tmp_path, "--ground", "the red one, on the left", "--ground", "a blue one")
    assert written["task"] == "grounding"
    assert written["classes"] == ["the red one, on the left", "a blue one"]
    assert [[one["found"] for one in entry["expressions"]] for entry in written["pictures"]] == [
        [True, True],
        [False, True],
    ]
    assert "b.png: the red one, on the left: absent, a blue one: 0.89\n" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "text"), [([], "red and blue"), (["long"], "a picture of red and blue")])
def test_caption(pictures, tmp_path, capsys, given, text):
    written = run(pictures, tmp_path, "--caption", *given)
    assert written["task"] == "captioning" and written["classes"] == []
    assert [entry["text"] for entry in written["pictures"]] == [text, text.replace("red and ", "")]
    assert f"a.png: {text}\n" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "a.png") as annotated:
        assert annotated.width == 128 and annotated.height > 64


def test_question_with_options(pictures, tmp_path, network):
    arguments = ["--temperature", "0.7", "--top-p", "0.9", "--max-tokens", "9", "--seed", "4"]
    written = run(pictures, tmp_path, "--question", "how many are there?", *arguments)
    assert [entry["text"] for entry in written["pictures"]] == ["2", "1"]
    assert "how many are there?" in written["instruction"]
    assert network.options == TextOptions(max_tokens=9, temperature=0.7, top_p=0.9, seed=4)
    run(pictures, tmp_path, "--question", "how many are there?", "--beams", "4")
    assert network.options == TextOptions(beams=4)


def test_stream(pictures, tmp_path, capsys, network):
    run(pictures, tmp_path, "--caption", "long", "--stream", "--batch-size", "8")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{pictures[0]}: a picture of red and blue", f"{pictures[1]}: a picture of blue"]
    assert [len(call) for call in network.calls] == [1, 1]


def test_instructions_of_any_task(pictures, tmp_path):
    text = (
        'Segment {"red": <c0>} in <image> as (c, x1, y1, x2, y2, ..., x8, y8), offsets within the range 512.'
    )
    written = run(pictures, tmp_path, "--instruction", text)
    assert written["task"] == "segmentation" and written["instruction"] == text
    assert len(written["pictures"][0]["boxes"][0]["polygon"]) == 16


def test_a_format_that_the_parser_does_not_know_is_asked_of_the_model(pictures, tmp_path, network):
    written = run(pictures, tmp_path, "--instruction", UNKNOWN)
    assert written["format_source"] == "model" and written["task"] == "detection"
    assert [len(entry["boxes"]) for entry in written["pictures"]] == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--segment"], "one of the arguments --instruction --classes --ground --caption --question"),
        (["--caption", "--segment"], "--segment: expected --classes beside it"),
        (["--question", "what?", "--keypoints", "nose"], "--keypoints: expected --classes beside it"),
        (["--classes", "dog", "--points", "8"], "--points: expected --segment beside it"),
        (["--classes", "dog", "--segment", "--keypoints", "nose"], "expected one of them"),
        (["--classes", "dog", "--segment", "--points", "99"], "points must be"),
        (["--classes", "dog", "--keypoints", "nose,,eye"], "keypoints: expected a name at position 1"),
        (["--classes", "dog", "--stream"], "--stream: expected --caption, --question or"),
        (["--instruction", UNKNOWN, "--stream"], "--stream: expected --caption, --question or"),
        (["--caption", "--stream", "--beams", "2"], "--stream: expected one beam"),
        (["--caption", "enormous"], "invalid choice: 'enormous'"),
        (["--caption", "--temperature", "-1"], "expected 0 or more"),
        (["--caption", "--top-p", "0"], "top_p must be above 0"),
        (["--caption", "--beams", "2", "--temperature", "1"], "exclude each other"),
        (["--caption", "--seed", "-1"], "seed must be"),
        (["--question", " "], "question"),
        (["--ground", "a", "--ground", "a"], "expressions: 'a' is listed twice"),
        (["--ground", "a", "--question", "b"], "not allowed with"),
    ],
)
def test_usage_errors_are_2(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["predict", "a.png", "--output", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_task_that_the_weights_do_not_know_is_one_line(pictures, tmp_path, capsys, network):
    network.config = type(network.config)(tasks=("detection",))
    assert main(["predict", *pictures, "--caption", "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error == "visionllm predict: these weights were trained for detection, not for captioning\n"
