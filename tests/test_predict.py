"""From pictures and an instruction to results, with a network whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from colour_network import ColourNetwork, picture
from PIL import Image

import visionllm.model_folder
from visionllm.image import ImageError
from visionllm.instruction import Instruction, InstructionError
from visionllm.pipeline import VisionLLM, class_request, load, model_folder

RED_AND_BLUE = {"red": (16, 8, 48, 40), "blue": (80, 16, 112, 64)}
TEXT = 'Identify all objects of the category set {"blue": <c0>, "red": <c1>} in the image <image>. '
TEXT += "Output (c, x1, y1, x2, y2), absolute coordinates within the range 1024."


@pytest.fixture
def model() -> VisionLLM:
    return VisionLLM(ColourNetwork())


def test_boxes_are_in_pixels_of_the_picture(model):
    result = model.predict(picture(**RED_AND_BLUE), TEXT)
    assert result.boxes.names == ["red", "blue"]
    assert result.boxes.labels.tolist() == [1, 0]
    assert result.boxes.xyxy.dtype == np.float32
    np.testing.assert_allclose(result.boxes.xyxy, [RED_AND_BLUE["red"], RED_AND_BLUE["blue"]], atol=2)
    assert result.boxes.scores[0] > result.boxes.scores[1] > 0.8
    assert len(result) == 2 and len(result.all_boxes) == 3, "the box of score 0.1 is kept for evaluation"


def test_threshold(model):
    assert len(model.predict(picture(**RED_AND_BLUE), TEXT, threshold=0.0)) == 3
    assert len(model.predict(picture(**RED_AND_BLUE), TEXT, threshold=0.95)) == 0
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"threshold: expected a score in 0\.\.1"):
            model.predict(picture(), TEXT, threshold=wrong)


def test_answer_follows_the_range_and_the_coordinates(model):
    image = picture(red=(32, 16, 64, 48))
    absolute = model.predict(image, Instruction(classes=("green", "red"), range=1000, coordinates="absolute"))
    assert str(absolute) == "The bounding boxes are [(<c1>, 250.0, 250.0, 500.0, 750.0)]."
    offset = model.predict(image, Instruction(classes=("red",), range=512))
    assert str(offset) == "The bounding boxes are [(<c0>, -64, -128, 64, 128)]."
    nothing = model.predict(image, Instruction(classes=("green",)))
    assert str(nothing) == "The bounding boxes are []."


def test_lists_are_batched_in_order(model, tmp_path):
    path = tmp_path / "blue.png"
    Image.fromarray(picture(blue=(0, 0, 64, 64))).save(path)
    images = [picture(red=(0, 0, 64, 32)), path, str(path), Image.fromarray(picture()), picture(200, 300)]
    results = model.predict(images, TEXT, batch_size=2)
    assert [result.boxes.names for result in results] == [["red"], ["blue"], ["blue"], [], []]
    assert [len(call) for call in model.network.calls] == [2, 2, 1]
    assert results[1].source == str(path)
    assert (results[4].width, results[4].height) == (200, 300)


def test_one_picture_gives_a_result_and_collections_give_lists(model):
    image = picture(red=(0, 0, 64, 32))
    assert model.predict(image, TEXT).boxes.names == ["red"]
    assert len(model.predict([image], TEXT)) == 1
    assert len(model.predict(np.stack([image, image]), TEXT)) == 2
    assert len(model.predict((item for item in [image, image, image]), TEXT)) == 3
    assert model.predict([], TEXT) == []


def test_an_instruction_for_each_picture(model):
    image = picture(**RED_AND_BLUE)
    instructions = [Instruction(classes=("blue",)), TEXT, Instruction(classes=("pink", "red"))]
    results = model.predict([image] * 3, instructions)
    assert [result.boxes.names for result in results] == [["blue"], ["red", "blue"], ["red"]]
    with pytest.raises(ValueError, match="expected one, or 2 for as many pictures, got 3"):
        model.predict([image] * 2, instructions)


def test_detect_equals_predict(model):
    image = picture(**RED_AND_BLUE)
    detected = model.detect(image, ["blue", "red"])
    predicted = model.predict(image, Instruction(classes=("blue", "red")))
    np.testing.assert_array_equal(detected.boxes.xyxy, predicted.boxes.xyxy)
    assert detected.boxes.names == predicted.boxes.names == ["red", "blue"]


@pytest.mark.parametrize("count", [512, 513, 1024, 1203])
def test_large_class_sets_are_asked_in_groups(model, count):
    names = [f"thing {k}" for k in range(count)]
    names[3], names[-1] = "red", "blue"
    result = model.detect(picture(**RED_AND_BLUE), names)
    assert result.boxes.names == ["red", "blue"]
    assert result.boxes.labels.tolist() == [3, count - 1]
    asked = [instruction for call in model.network.calls for instruction in call]
    assert tuple(name for instruction in asked for name in instruction.classes) == tuple(names)
    assert len(asked) == -(-count // 512)
    sizes = [len(instruction.classes) for instruction in asked]
    assert max(sizes) <= 512 and max(sizes) - min(sizes) <= 1
    assert len(str(result).splitlines()) == len(asked)
    assert str(result).count("<c3>") == 1
    scores = result.all_boxes.scores
    assert (np.diff(scores) <= 0).all() and len(scores) == 2 + len(asked)


def test_groups_keep_the_best_hundred():
    class Many(ColourNetwork):
        def _find(self, image, classes, top):
            found = super()._find(image, classes, top)
            for field in ("boxes", "scores", "labels", "centers", "bins", "points"):
                value = getattr(found, field)
                setattr(found, field, value[:1].repeat(top, *[1] * (value.ndim - 1)))
            return found

    result = VisionLLM(Many()).detect(picture(red=(0, 0, 9, 9)), [f"thing {k}" for k in range(600)] + ["red"])
    assert len(result.all_boxes) == 100
    assert set(result.all_boxes.names) == {"red"}, "the second group's boxes have the higher scores"


def test_pictures_with_different_numbers_of_groups(model):
    image = picture(**RED_AND_BLUE)
    requests = [class_request(["red"]), class_request([f"thing {k}" for k in range(600)] + ["blue"])]
    results = model.run([image, image], requests, 0.3)
    assert [result.boxes.names for result in results] == [["red"], ["blue"]]
    assert [len(call) for call in model.network.calls] == [2, 1]
    assert model.run([], [], 0.3) == []


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("dog", "expected a list of names, got the text 'dog': write"),
        ([], "expected at least one name"),
        (["dog", " "], "expected a name at position 1, got ' '"),
        (["dog", 3], "expected a name at position 1, got 3"),
        (["dog", "cat", "dog"], "'dog' is listed twice"),
    ],
)
def test_bad_classes(model, classes, message):
    with pytest.raises(ValueError, match=message):
        model.detect(picture(), classes)


def test_bad_instructions(model):
    with pytest.raises(InstructionError, match="position"):
        model.predict(picture(), 'Find {"dog": <c0>, "cat": <c0>} in <image>')
    with pytest.raises(TypeError, match="expected text or an Instruction, got int"):
        model.predict([picture()], [3])
    model = VisionLLM(ColourNetwork(tasks=("detection",)))
    with pytest.raises(ValueError, match="trained for detection, not for captioning"):
        model.predict([], Instruction(task="captioning"))


def test_bad_pictures_are_named(model, tmp_path):
    with pytest.raises(ImageError, match=r"nothing\.jpg: no such file"):
        model.predict([picture(), tmp_path / "nothing.jpg"], TEXT)
    with pytest.raises(ImageError, match="more than the limit of 100"):
        model.predict(picture(), TEXT, max_pixels=100)
    with pytest.raises(ValueError, match="batch_size: expected 1 or more, got 0"):
        model.predict(picture(), TEXT, batch_size=0)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "cpu:x"])
def test_devices_that_are_not_there(tmp_path, device):
    with pytest.raises(ValueError, match="device: "):
        VisionLLM.from_pretrained(tmp_path, device)


def test_packaged_names_go_before_folders(tmp_path, monkeypatch):
    """A folder in the working directory that happens to have the name is another one."""
    monkeypatch.setattr(visionllm.model_folder.resources, "files", lambda package: tmp_path / "package")
    packaged = tmp_path / "package" / "weights" / "tiny"
    packaged.mkdir(parents=True)
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_folder("tiny") == Path("tiny"), "no such packaged weights"
    (packaged / "model.safetensors").touch()
    assert model_folder("tiny") == model_folder() == packaged
    for folder in ("./tiny", Path("tiny"), tmp_path / "tiny"):
        assert model_folder(folder).resolve() == (tmp_path / "tiny").resolve()


def test_missing_models_say_what_to_do(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="enormous: expected a model folder or the name of .*visionllm train"
    ):
        load("enormous")
    with pytest.raises(FileNotFoundError, match="expected a model folder, found none"):
        VisionLLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load(tmp_path)
