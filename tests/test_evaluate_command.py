"""``visionllm evaluate`` for every task and source, with a network whose right answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from colour_network import COLOURS, ColourNetwork, picture
from coloured_samples import POINTS, RECTANGLES, coloured_samples
from PIL import Image
from small_network import small_network

import visionllm.pipeline
from visionllm.cli import main
from visionllm.pipeline import VisionLLM

NAMES = list(COLOURS)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pictures, and what is known of them in every format."""
    (tmp_path / "images").mkdir()
    images, annotations, captions = [], [], []
    for index, (rectangles, sample) in enumerate(zip(RECTANGLES, coloured_samples(), strict=True)):
        name, image_id = f"COCO_val2014_{index + 1:012d}.png", index + 1
        Image.fromarray(picture(**rectangles)).save(tmp_path / "images" / name)
        images.append({"id": image_id, "file_name": name, "width": 128, "height": 64})
        for k, (colour, (x1, y1, x2, y2)) in enumerate(rectangles.items()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 10 + NAMES.index(colour),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                    "keypoints": [value for name in POINTS for value in sample.keypoints[k][name]],
                    "num_keypoints": 5,
                }
            )
        for caption in sample.captions.get("short", []):
            captions.append({"id": len(captions), "image_id": image_id, "caption": caption})
    categories = [
        {"id": 10 + k, "name": name, "keypoints": list(POINTS), "skeleton": []}
        for k, name in enumerate(NAMES)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    files = {
        "instances": content,
        "captions": {"images": images, "annotations": captions},
        "refs": [
            {
                "ref_id": entry["id"],
                "image_id": entry["image_id"],
                "ann_id": entry["id"],
                "category_id": entry["category_id"],
                "split": "val" if entry["image_id"] < 3 else "testA",
                "sentences": [
                    {
                        "sent_id": entry["id"],
                        "sent": f"the {NAMES[entry['category_id'] - 10]} one",
                        "tokens": [],
                    }
                ],
            }
            for entry in annotations
        ],
        "karpathy": {
            "dataset": "coco",
            "images": [
                {
                    "filepath": "",
                    "filename": image["file_name"],
                    "cocoid": image["id"],
                    "imgid": image["id"],
                    "sentids": [0],
                    "split": "test",
                    "sentences": [{"raw": text, "tokens": text.split(), "sentid": 0, "imgid": 0}],
                }
                for image, text in zip(images, ["Red and blue.", "Green.", "A cat."], strict=False)
            ],
        },
        "llava": [
            {
                "id": "1",
                "image": images[0]["file_name"],
                "conversations": [
                    {"from": "human", "value": "<image>\nHow many?"},
                    {"from": "gpt", "value": "Two."},
                    {"from": "human", "value": "Why?"},
                    {"from": "gpt", "value": "It is so."},
                ],
            }
        ],
        "lvis": {
            **content,
            "images": [
                {**image, "neg_category_ids": [], "not_exhaustive_category_ids": []} for image in images
            ],
            "categories": [{**entry, "frequency": "rcf"[k % 3]} for k, entry in enumerate(categories)],
        },
    }
    for name, written in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(written))
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch):
    """Runs the command line and returns metrics and predictions; ``@name`` is one of the files."""

    def command(*options: str, network=None) -> tuple[dict, list]:
        monkeypatch.setattr(visionllm.pipeline, "load", lambda *_: VisionLLM(network or ColourNetwork()))
        output = folder / "out"
        arguments = [str(folder / f"{one[1:]}.json") if one.startswith("@") else one for one in options]
        if "--scenes" not in arguments:
            arguments += ["--images", str(folder / "images")]
        assert main(["evaluate", *arguments, "--output", str(output)]) == 0
        return tuple(json.loads((output / f"{name}.json").read_text()) for name in ("metrics", "predictions"))

    return command


def test_polygons(run, capsys):
    metrics, predictions = run("--task", "segmentation", "--annotations", "@instances", "--points", "24")
    assert metrics["AP"] > 0.95 and metrics["boxes"]["AP"] > 0.99 and metrics["points"] == 24
    assert metrics["polygon_loss"]["points"] == 24 and metrics["polygon_loss"]["AP"] > 0.9
    assert predictions[0]["segmentation"]["size"] == [64, 128] and predictions[0]["category_id"] >= 10
    printed = capsys.readouterr().out
    assert "their extents as boxes:" in printed and "ground truth as polygons of 24 points" in printed


def test_keypoints(run):
    metrics, predictions = run("--task", "keypoints", "--annotations", "@instances")
    assert metrics["AP"] == pytest.approx(1.0) and metrics["keypoints"] == list(POINTS)
    assert {entry["image_id"] for entry in predictions} == {1, 2, 3, 4}
    some, _ = run("--task", "keypoints", "--annotations", "@instances", "--keypoints", "top left, center")
    assert some["keypoints"] == ["top left", "center"] and some["AP"] == pytest.approx(1.0)


def test_how_exactly_keypoints_are_to_be_met(run):
    class Shifted(ColourNetwork):
        def find(self, images, instructions, top=100, spread=False):
            found = super().find(images, instructions, top, spread)
            for one in found:
                one.points = one.points + 0.01
            return found

    options = ("--task", "keypoints", "--annotations", "@instances", "--sigma")
    assert run(*options, "0.2", network=Shifted())[0]["AP"] == pytest.approx(1.0)
    assert run(*options, "0.001", network=Shifted())[0]["AP"] == 0


def test_references(run):
    metrics, predictions = run("--task", "grounding", "--refs", "@refs")
    assert metrics["expressions"] == 3 and metrics["P@0.5"] == 1 and metrics["absent"] == 0
    assert metrics["absent_found"] is None and metrics["images"] == 2
    assert predictions[0]["text"] == "the red one" and predictions[0]["iou"] == 1
    other, _ = run("--task", "grounding", "--refs", "@refs", "--split", "testA", "--at-once", "2")
    assert other["expressions"] == 3


def test_expressions_made_from_annotations(run):
    metrics, predictions = run("--task", "grounding", "--annotations", "@instances")
    assert metrics["expressions"] == len(predictions) > 4


def test_captions(run, capsys):
    metrics, _ = run("--task", "captioning", "--annotations", "@instances", "--captions", "@captions")
    assert metrics["short"]["pictures"] == 3 and metrics["short"]["BLEU-1"] == pytest.approx(1)
    assert "long" not in metrics
    assert "'red and blue'; right: 'red and blue'" in capsys.readouterr().out
    network = ColourNetwork()
    options = ["--karpathy", "@karpathy", "--lengths", "short", "--beams", "3", "--max-tokens", "9"]
    metrics, predictions = run("--task", "captioning", *options, network=network)
    assert metrics["short"]["pictures"] == 3 and predictions[1]["references"] == ["Green."]
    assert (network.options.beams, network.options.max_tokens) == (3, 9)


def test_answers(run, capsys):
    metrics, predictions = run("--task", "vqa", "--conversations", "@llava")
    assert metrics["exact_match"] == 0.5 and metrics["questions"] == 2
    assert predictions[0]["said"] == "2" and predictions[0]["answer"] == "Two."
    assert "'How many?': '2'; right: 'Two.'" in capsys.readouterr().out


def test_groups_of_names(run, capsys):
    network = small_network()
    metrics, _ = run("--annotations", "@lvis", "--lvis", "--group-size", "2", network=network)
    assert metrics["groups"] == 3 and {"AP", "APr", "APc", "APf"} <= set(metrics)
    assert "5 names in 3 groups" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "size"), [(["--scene-size", "96"], 96), ([], 48)], ids=str)
def test_scenes_of_a_size(run, tmp_path, options, size):
    """The one asked for, else what the model sees."""
    small_network(image_size=48).save_pretrained(tmp_path / "model")
    metrics, predictions = run(
        "--scenes", "val", "--limit", "3", "--model", str(tmp_path / "model"), *options
    )
    assert metrics["scene_size"] == size
    assert all(x >= 0 and x + w <= size + 0.01 for x, _, w, _ in (entry["bbox"] for entry in predictions))


@pytest.mark.parametrize("task", ["detection", "segmentation", "keypoints", "grounding", "captioning", "vqa"])
def test_scenes(run, task):
    metrics, predictions = run("--task", task, "--scenes", "val", "--limit", "3")
    assert metrics["images"] == 3 and metrics["scenes"] == "val" and predictions
    if task == "vqa":
        assert set(metrics["by_kind"]) <= {"count", "colour", "position", "yes_no", "comparison"}
    if task == "captioning":
        assert set(metrics) >= {"short", "long", "detailed"}
    if task == "grounding":
        assert metrics["present"] > 0 and metrics["absent"] > 0


@pytest.mark.parametrize("task", ["segmentation", "keypoints", "grounding", "captioning", "vqa"])
def test_a_reserved_wording(run, task):
    metrics, _ = run("--task", task, "--scenes", "val", "--limit", "2", "--template", "2")
    assert metrics["template"] == 2


def test_robustness_of_keypoints(run, folder):
    options = ["--task", "keypoints", "--annotations", "@instances", "--robustness", "--limit", "1"]
    with pytest.raises(FileNotFoundError):
        run(*options)  # it writes robustness.json instead of metrics.json
    found = json.loads((folder / "out" / "robustness.json").read_text())
    assert len(found["runs"]) == 10 and found["AP_spread"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected one of --scenes, --annotations, --refs, --karpathy, --conversations, got none"),
        (["--scenes", "val", "--refs", "x"], "got --scenes and --refs"),
        (["--annotations", "x"], "--annotations needs --images"),
        (["--refs", "x", "--images", "y"], "--refs belongs to --task grounding, got detection"),
        (["--scenes", "val", "--task", "vqa", "--list-classes", "3"], "--list-classes belongs to --task"),
        (["--scenes", "val", "--at-once", "2"], "--at-once belongs to --task grounding, got detection"),
        (["--scenes", "val", "--task", "keypoints", "--keypoints", "a,a"], "expected different names"),
        (["--scenes", "val", "--group-size", "3", "--robustness"], "--group-size asks for all names"),
        (["--scenes", "val", "--lvis"], "--lvis belongs to --annotations and --task detection"),
        (["--scenes", "val", "--task", "vqa", "--template", "99"], "--template: expected 1 to 8, got 99"),
    ],
)
def test_options_that_do_not_fit(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", *options, "--output", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
