"""Evaluation of a data set, with a network whose right and wrong answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from colour_network import COLOURS, ColourNetwork, picture
from PIL import Image

import visionllm.pipeline
from visionllm.cli import main
from visionllm.evaluate.confusion import confusion_matrix, confusion_pairs
from visionllm.evaluate.dataset import EvaluationSet
from visionllm.evaluate.evaluation import PromptOptions, absent_listings, class_listings, evaluate, passes
from visionllm.evaluate.matching import box_iou, match_greedily
from visionllm.evaluate.prediction import PicturePrediction
from visionllm.evaluate.prompts import ClassListing, list_absent, list_all, list_some
from visionllm.evaluate.rejection import measure_rejection
from visionllm.image import ImageError
from visionllm.instruction import EVAL_TEMPLATES
from visionllm.pipeline import VisionLLM

NAMES = list(COLOURS)
PLACES = [
    {"red": (16, 8, 48, 40), "blue": (80, 16, 112, 64)},
    {"green": (0, 0, 64, 32)},
    {"yellow": (8, 8, 120, 24), "pink": (8, 32, 40, 64), "red": (64, 32, 128, 64)},
    {},
]


def write_set(folder: Path) -> Path:
    """Four pictures with rectangles; ids that are neither positions nor sorted; annotations without area."""
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for index, places in enumerate(PLACES):
        Image.fromarray(picture(**places)).save(folder / "images" / f"{index}.png")
        image_id = 100 - 7 * index
        images.append({"id": image_id, "file_name": f"{index}.png", "width": 128, "height": 64})
        for name, (x1, y1, x2, y2) in places.items():
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": image_id,
                    "category_id": 10 + NAMES.index(name),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
            )
    categories = [{"id": 10 + index, "name": name} for index, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "set.json").write_text(json.dumps(content))
    return folder / "set.json"


@pytest.fixture
def annotations(tmp_path) -> Path:
    return write_set(tmp_path / "data")


@pytest.fixture
def dataset(annotations) -> EvaluationSet:
    return EvaluationSet(annotations, annotations.parent / "images")


def run_command(annotations: Path, output: Path, monkeypatch, network, *options: str) -> int:
    monkeypatch.setattr(visionllm.pipeline, "load", lambda *_: VisionLLM(network))
    images = annotations.parent / "images"
    arguments = ["--annotations", str(annotations), "--images", str(images), "--output", str(output)]
    return main(["evaluate", *arguments, *options])


def test_a_network_that_is_right_scores_one(annotations, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    assert run_command(annotations, output, monkeypatch, ColourNetwork()) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    for name in ("AP", "AP50", "AP75", "APm", "AR1", "AR10", "AR100"):
        assert metrics[name] == pytest.approx(1.0), name
    assert metrics["APl"] == -1, "no rectangle is large"
    assert metrics["images"] == 4 and metrics["objects"] == 6 and metrics["rejection"] is None
    assert metrics["boxes_per_image_over_threshold"] == 1.5
    results = json.loads((output / "predictions.json").read_text())
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score"}
    assert {entry["image_id"] for entry in results} == {100, 93, 86, 79}
    classes = json.loads((output / "classes.json").read_text())
    assert {row["name"]: row["objects"] for row in classes} == {n: 2 if n == "red" else 1 for n in NAMES}
    pairs = json.loads((output / "confusion.json").read_text())["pairs"]
    assert all(pair["true"] == pair["said"] for pair in pairs) and sum(pair["count"] for pair in pairs) == 6
    drawn = json.loads((output / "precision_recall.json").read_text())
    assert drawn["classes"] == 5 and drawn["recall"] == [k / 100 for k in range(101)]
    assert [curve["iou"] for curve in drawn["curves"]] == ["0.50", "0.75", "0.90", "0.50:0.95"]
    assert [curve["AP"] for curve in drawn["curves"]] == pytest.approx(
        [metrics["AP50"], metrics["AP75"], 1, metrics["AP"]]
    )
    assert all(curve["precision"] == pytest.approx([1.0] * 101) for curve in drawn["curves"])
    for name in ("precision_recall.png", "confusion.png"):
        with Image.open(output / name) as drawn:
            assert min(drawn.size) > 200 and len(set(drawn.convert("L").tobytes())) > 20
    assert "AP 100.0  AP50 100.0" in capsys.readouterr().out


def test_class_order_and_wording_are_mapped_back(dataset):
    for options in (PromptOptions(shuffle=3), PromptOptions(template=EVAL_TEMPLATES["detection"][2])):
        network = ColourNetwork()
        found = evaluate(VisionLLM(network), dataset, options, batch_size=3)
        assert found.coco.metrics["AP"] == pytest.approx(1.0)
        asked = network.calls[0][0]
        if options.shuffle is not None:
            assert sorted(asked.classes) == sorted(NAMES) and list(asked.classes) != NAMES
        else:
            assert asked.text == options.template.instruction(NAMES).text


def test_listing_some_classes_counts_listed_objects_only(dataset):
    options = PromptOptions(listed=2, seed=1)
    network = ColourNetwork()
    progress = []
    found = evaluate(VisionLLM(network), dataset, options, batch_size=3, done=progress.append)
    assert sum(progress) == passes(dataset, options) == 8
    assert found.coco.metrics["AP"] == pytest.approx(1.0)
    assert all(len(instruction.classes) == 2 for call in network.calls for instruction in call)
    rejection = found.rejection
    listed = sum(
        name in {NAMES[index] for index in listing.indices}
        for places, listing in zip(PLACES, class_listings(dataset, options), strict=True)
        for name in places
    )
    assert 0 < listed < 6
    assert (rejection.listed_objects, rejection.unlisted_objects) == (listed, 6 - listed)
    assert rejection.listed_found == listed
    assert rejection.score > 0.8
    assert rejection.unlisted_boxed == 0 and rejection.absent_shown == 0 and rejection.absent_pictures == 4


@pytest.mark.parametrize(("mistaken", "share"), [(0.95, 1.0), (0.5, 0.0)])
def test_boxes_of_unlisted_classes_are_counted_above_the_score(dataset, mistaken, share):
    found = evaluate(VisionLLM(ColourNetwork(mistaken)), dataset, PromptOptions(listed=2, seed=1))
    rates = found.rejection.to_dict()
    assert rates["unlisted_boxed_rate"] == share
    assert rates["absent_shown_rate"] == share * 3 / 4, "one picture is empty"
    assert found.coco.metrics["AP"] == pytest.approx(1.0) if not share else found.coco.metrics["AP"] < 1


def test_a_right_box_is_no_box_of_an_unlisted_object_beneath_it():
    def prediction(*scores: float) -> PicturePrediction:
        count = len(scores)
        boxes = np.tile(np.array([0, 0, 10, 10], np.float32), (count, 1))
        return PicturePrediction(1, ClassListing((0,)), boxes, np.array(scores), np.zeros(count, np.int64))

    objects = {1: [{"category_id": k, "bbox": [0, 0, 10, 9 + k], "iscrowd": 0} for k in (0, 1)]}
    right = measure_rejection([prediction(0.9)], [], objects, [0, 1])
    assert (right.listed_found, right.unlisted_objects, right.unlisted_boxed, right.score) == (1, 1, 0, 0.9)
    twice = measure_rejection([prediction(0.9, 0.9)], [], objects, [0, 1])
    assert (twice.listed_found, twice.unlisted_boxed) == (1, 1)


def test_a_network_that_finds_nothing_has_no_score(dataset):
    class Blind(ColourNetwork):
        def _find(self, image, classes, top):
            return super()._find(np.zeros_like(image), classes, top)

    found = evaluate(VisionLLM(Blind()), dataset, PromptOptions(listed=3))
    assert found.coco.metrics["AP"] == 0
    rates = found.rejection.to_dict()
    assert (
        rates["score"] is None and rates["unlisted_boxed_rate"] is None and rates["absent_shown_rate"] is None
    )


def test_listing_command_prints_the_rates(annotations, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    options = (
        "--list-classes",
        "2",
        "--seed",
        "1",
        "--limit",
        "3",
        "--template",
        "4",
        "--shuffle-classes",
        "5",
    )
    assert run_command(annotations, output, monkeypatch, ColourNetwork(0.95), *options) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["images"] == 3 and metrics["template"] == 4 and metrics["shuffle_classes"] == 5
    assert metrics["rejection"]["absent_shown_rate"] == 1
    assert "absent classes only that show a box: 100.0 % of 3" in capsys.readouterr().out


def test_what_is_not_listed_is_in_no_count(annotations, tmp_path, monkeypatch):
    """The network marks listed objects rightly and is silent on the others: nothing is missed."""
    output = tmp_path / "out"
    options = ("--list-classes", "2", "--seed", "1")
    assert run_command(annotations, output, monkeypatch, ColourNetwork(), *options) == 0
    metrics, classes, confusion = (
        json.loads((output / f"{name}.json").read_text()) for name in ("metrics", "classes", "confusion")
    )
    listed = metrics["rejection"]["listed_objects"]
    assert 0 < listed < 6
    assert metrics["objects"] == sum(row["objects"] for row in classes) == listed
    assert all(pair["true"] == pair["said"] for pair in confusion["pairs"])
    assert sum(pair["count"] for pair in confusion["pairs"]) == listed


def test_robustness_command(annotations, tmp_path, monkeypatch, capsys):
    network = ColourNetwork()
    output = tmp_path / "out"
    assert run_command(annotations, output, monkeypatch, network, "--robustness") == 0
    found = json.loads((output / "robustness.json").read_text())
    assert len(found["runs"]) == 10 and found["AP_spread"] == 0 and found["AP_min"] == pytest.approx(1)
    texts = {call[0].text or call[0].render() for call in network.calls}
    assert len(texts) == 10, "every run asks in another way"
    orders = {call[0].classes for call in network.calls}
    assert len(orders) == 3
    assert "spread of AP: 0.00 points" in capsys.readouterr().out


def test_more_than_512_categories(annotations, tmp_path):
    content = json.loads(annotations.read_text())
    content["categories"] = [{"id": 1000 + k, "name": f"thing {k}"} for k in range(600)] + content[
        "categories"
    ]
    annotations.write_text(json.dumps(content))
    network = ColourNetwork()
    found = evaluate(VisionLLM(network), EvaluationSet(annotations, annotations.parent / "images"))
    assert found.coco.metrics["AP"] == pytest.approx(1.0)
    assert {len(instruction.classes) for call in network.calls for instruction in call} == {302, 303}


def test_listed_classes_are_a_seeded_mix():
    listings = [list_some(300, [4, 50, 51, 52], 20, 0, image_id) for image_id in range(200)]
    assert listings == [list_some(300, [4, 50, 51, 52], 20, 0, image_id) for image_id in range(200)]
    assert listings != [list_some(300, [4, 50, 51, 52], 20, 1, image_id) for image_id in range(200)]
    present = [len({4, 50, 51, 52} & set(listing.indices)) for listing in listings]
    assert all(len(set(listing.indices)) == 20 for listing in listings)
    assert min(present) >= 1 and set(present) == {1, 2, 3, 4}
    places = [listing.indices.index(k) for listing in listings for k in (4, 50) if k in listing.indices]
    assert min(places) == 0 and max(places) == 19, "present classes stand anywhere"
    assert len(list_some(5, [1], 20, 0, "a").indices) in (4, 5)
    assert len(list_some(300, range(100), 20, 0, "a").indices) == 20


def test_absent_listings():
    listing = list_absent(30, [4, 5], 20, 0, "a")
    assert len(set(listing.indices)) == 20 and not {4, 5} & set(listing.indices)
    assert set(list_absent(5, [0, 1, 2], 20, 0, "a").indices) == {3, 4}
    assert list_absent(3, [0, 1, 2], 20, 0, "a") is None
    assert sorted(list_all(9).shuffled(1).indices) == list(range(9))


def test_classes_that_may_be_there_unannotated_are_never_absent(annotations):
    content = json.loads(annotations.read_text())
    content["images"][1]["not_exhaustive"] = [10, 11, 12]
    annotations.write_text(json.dumps(content))
    dataset = EvaluationSet(annotations, annotations.parent / "images")
    listing = class_listings(dataset, PromptOptions(listed=4))[1]
    assert sorted(listing.indices) == [1, 3, 4], "green is in the picture; red and blue may be"
    assert sorted(absent_listings(dataset, PromptOptions(listed=4))[1].indices) == [3, 4]


def test_iou_and_greedy_matching():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 20, 30]], float)
    np.testing.assert_allclose(box_iou(boxes, boxes), [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 0]])
    assert box_iou(boxes[:0], boxes).shape == (0, 3)
    iou = np.array([[0.9, 0.6], [0.8, 0.7], [0.95, 0.4]])
    everything = np.ones((3, 2), bool)
    assert match_greedily(iou, everything).tolist() == [0, 1, -1]
    assert match_greedily(iou, everything, threshold=0.75).tolist() == [0, -1, -1]
    assert match_greedily(iou, np.array([[0, 0], [1, 1], [1, 0]], bool)).tolist() == [-1, 0, -1]
    assert match_greedily(np.zeros((2, 0)), np.zeros((2, 0), bool)).tolist() == [-1, -1]


def test_confusion_counts(dataset):
    found = evaluate(VisionLLM(ColourNetwork()), dataset)
    blue, red = NAMES.index("blue"), NAMES.index("red")
    first = found.predictions[0]
    first.categories[first.categories == blue] = red
    matrix = confusion_matrix(found.predictions, dataset.objects(), dataset.category_ids, 0.3)
    assert matrix.sum() == 6 and matrix[blue, red] == 1 and matrix[red, red] == 2
    pairs = confusion_pairs(matrix, NAMES)
    assert pairs[0] == {"true": "red", "said": "red", "count": 2}
    everything = confusion_matrix(found.predictions, dataset.objects(), dataset.category_ids, 0.0)
    assert everything[-1].sum() == 4, "the box of score 0.1 lies on no object, in each picture"
    nothing = confusion_matrix(found.predictions, dataset.objects(), dataset.category_ids, 0.99)
    assert nothing[:-1, -1].sum() == nothing.sum() == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), r"set\.json: images: missing"),
        (lambda c: c["images"][1].pop("file_name"), r"images\[1\]\.file_name: missing"),
        (lambda c: c["images"][1].update(id=100), r"images\[1\]\.id: duplicate id 100"),
        (
            lambda c: c["images"][1].update(file_name=3),
            r"images\[1\]\.file_name: expected a file name",
        ),
        (lambda c: c["images"][1].update(not_exhaustive=3), r"images\[1\]\.not_exhaustive: expected a list"),
        (lambda c: c["images"].clear(), "images: expected at least one, got none"),
        (lambda c: c["categories"][2].update(name=7), r"categories\[2\]\.name: expected a name, got int 7"),
        (lambda c: c["categories"][2].update(name="red"), r"categories\[2\]\.name: duplicate name 'red'"),
        (lambda c: c["categories"].clear(), "categories: expected at least one, got none"),
        (
            lambda c: c["annotations"][2].update(image_id=5),
            r"annotations\[2\]\.image_id: expected the id of an image, got int 5",
        ),
        (
            lambda c: c["annotations"][2].update(category_id=5),
            r"annotations\[2\]\.category_id: unknown category int 5",
        ),
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2]),
            r"annotations\[0\]\.bbox: expected \[x, y, width",
        ),
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 3]),
            r"annotations\[0\]\.bbox: expected finite numbers",
        ),
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2, 3, -1]),
            r"annotations\[0\]\.bbox: expected no negative width",
        ),
        (
            lambda c: c["annotations"][1].update(iscrowd=None),
            r"annotations\[1\]\.iscrowd: expected 0 or 1, got NoneType",
        ),
        (lambda c: c["annotations"][1].update(area="4"), r"annotations\[1\]\.area: expected a non-negative"),
        (lambda c: c["annotations"].append(3), r"annotations\[6\]: expected an object, got int 3"),
    ],
)
def test_wrong_annotation_files_are_named(annotations, change, message):
    content = json.loads(annotations.read_text())
    change(content)
    annotations.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        EvaluationSet(annotations, annotations.parent / "images")


def test_what_training_refuses_may_be_in_the_set(annotations):
    """Boxes outside their picture and empty ones; no sizes, no ids of annotations, masks of any kind."""
    content = json.loads(annotations.read_text())
    content["annotations"][0]["bbox"] = [-20, -8, 400, 300]
    content["annotations"][1]["bbox"] = [5, 5, 0, 3]
    content["annotations"][2]["segmentation"] = "none"
    for annotation in content["annotations"]:
        del annotation["id"]
    for image in content["images"]:
        del image["width"], image["height"]
    annotations.write_text(json.dumps(content))
    dataset = EvaluationSet(annotations, annotations.parent / "images")
    found = evaluate(VisionLLM(ColourNetwork()), dataset)
    assert len(found.predictions) == 4 and 0 < found.coco.metrics["AP"] < 1


def test_all_that_is_wrong_is_listed(annotations):
    content = json.loads(annotations.read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = None
    annotations.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        EvaluationSet(annotations, annotations.parent / "images")
    lines = str(error.value).splitlines()
    assert lines[0] == "6 problems in the data set:" and len(lines) == 7


def test_no_json(annotations):
    annotations.write_text("{")
    with pytest.raises(ValueError, match=r"set\.json: expected JSON"):
        EvaluationSet(annotations, annotations.parent / "images")


def test_missing_and_broken_pictures_are_named(annotations, tmp_path, monkeypatch, capsys):
    (annotations.parent / "images" / "2.png").unlink()
    with pytest.raises(ImageError, match=r"set\.json: 1 of 4 pictures are missing: .*2\.png"):
        EvaluationSet(annotations, annotations.parent / "images")
    (annotations.parent / "images" / "2.png").write_bytes(b"\x89PNG\r\n")
    output = tmp_path / "out"
    assert run_command(annotations, output, monkeypatch, ColourNetwork()) == 1
    assert "2.png: " in capsys.readouterr().err
    assert not (output / "metrics.json").exists()


def test_size_in_the_file_decides_about_rotation(annotations, dataset):
    path = annotations.parent / "images" / "0.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.open(path)
    stored.load()
    stored.save(path, exif=exif)
    entry = dataset.images[0]
    assert dataset.read(entry).shape == (64, 128, 3), "COCO counts stored pixels"
    assert dataset.read({**entry, "width": 64, "height": 128}).shape == (128, 64, 3)
    assert dataset.read({"id": 1, "file_name": "0.png"}).shape == (128, 64, 3)
    with pytest.raises(ImageError, match=r"0\.png: expected 5x64 pixels as annotated, got"):
        dataset.read({**entry, "width": 5})


def test_a_crowd_is_neither_missed_nor_unlisted(annotations):
    content = json.loads(annotations.read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    annotations.write_text(json.dumps(content))
    dataset = EvaluationSet(annotations, annotations.parent / "images")
    found = evaluate(VisionLLM(ColourNetwork()), dataset, PromptOptions(listed=2))
    assert found.rejection.listed_objects == found.rejection.unlisted_objects == 0
    assert found.coco.metrics["AP"] == -1


def test_template_out_of_range(annotations, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(annotations, tmp_path / "out", monkeypatch, ColourNetwork(), "--template", "9")
    assert stopped.value.code == 2
    assert "--template: expected 1 to 8, got 9" in capsys.readouterr().err


def test_the_same_pictures_give_the_same_files(annotations, tmp_path, monkeypatch):
    for name in ("one", "two"):
        assert (
            run_command(annotations, tmp_path / name, monkeypatch, ColourNetwork(), "--list-classes", "3")
            == 0
        )
    for path in sorted((tmp_path / "one").glob("*.json")):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
