"""The pipeline with the real network, its weights random: shapes, batching, groups, saving, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visionllm
from visionllm.instruction import Instruction, MalformedAnswer, parse_answer
from visionllm.model.config import PRESETS
from visionllm.model.network import build_network
from visionllm.pipeline import VisionLLM
from visionllm.tokenizer import Tokenizer

TOKENIZER = Path(visionllm.__file__).parent / "weights" / "tiny" / "tokenizer.model"


@pytest.fixture(scope="module")
def model() -> VisionLLM:
    network = build_network(PRESETS["tiny"], Tokenizer.from_file(TOKENIZER), seed=1)
    return VisionLLM(network)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def assert_close(a, b):
    np.testing.assert_allclose(a.all_boxes.scores, b.all_boxes.scores, atol=1e-4)
    # Equal scores may stand in another order.
    apart = np.abs(np.diff(a.all_boxes.scores, prepend=2.0, append=-1.0))
    clear = (apart[:-1] > 1e-4) & (apart[1:] > 1e-4)
    np.testing.assert_array_equal(a.all_boxes.labels[clear], b.all_boxes.labels[clear])
    np.testing.assert_allclose(a.all_boxes.xyxy[clear], b.all_boxes.xyxy[clear], atol=0.1)


def test_candidates_are_whole_and_in_the_picture(model):
    result = model.detect(noise(120, 300), ["dog", "red car", "a very long name of a thing"], threshold=0.0)
    boxes = result.boxes
    assert len(boxes) == 100 and boxes.xyxy.shape == (100, 4)
    assert (boxes.xyxy[:, :2] <= boxes.xyxy[:, 2:]).all()
    assert boxes.xyxy.min() >= 0 and (boxes.xyxy.max(axis=0) <= [300, 120, 300, 120]).all()
    assert (np.diff(boxes.scores) <= 0).all() and boxes.scores.min() >= 0 and boxes.scores.max() <= 1
    assert set(boxes.labels.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("coordinates", ["offset", "absolute"])
def test_the_answer_can_be_read(model, coordinates):
    instruction = Instruction(classes=("dog", "cat"), range=1024, coordinates=coordinates)
    result = model.predict(noise(100, 80), instruction, threshold=0.0)
    answer = parse_answer(str(result), instruction)
    assert not isinstance(answer, MalformedAnswer), str(answer)
    np.testing.assert_array_equal(answer.labels, result.boxes.labels)


def test_batching_changes_nothing(model):
    images = [noise(90, 200, 1), noise(224, 224, 2), noise(31, 17, 3)]
    requests = [
        Instruction(classes=("dog",)),
        Instruction(classes=tuple(f"thing number {k}" for k in range(30))),
        "Find {'cat': <c0>, 'traffic light': <c1>} in <image>, absolute coordinates within the range 100.",
    ]
    together = model.predict(images, requests, batch_size=3)
    for image, request, result in zip(images, requests, together, strict=True):
        assert_close(result, model.predict(image, request))


def test_saving_and_loading_changes_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    loaded = visionllm.load(tmp_path / "model", device="cpu")
    image = noise(100, 100)
    first, second = model.detect(image, ["dog", "cat"]), loaded.detect(image, ["dog", "cat"])
    np.testing.assert_array_equal(first.all_boxes.xyxy, second.all_boxes.xyxy)
    np.testing.assert_array_equal(first.all_boxes.scores, second.all_boxes.scores)


def test_more_than_512_classes(model):
    result = model.detect(noise(64, 64), [f"thing {k}" for k in range(520)], threshold=0.0)
    assert len(result) == 100
    assert result.boxes.labels.max() < 520 and len(result.instructions) == 2


def test_bfloat16_answers_alike(model):
    """Products rounded to 8 bits: every candidate's best score stays close, and so does its box."""
    picture, names = noise(120, 160), [f"thing {k}" for k in range(5)]
    reduced = VisionLLM(model.network, torch.bfloat16)
    exact, found = model.detect(picture, names), reduced.detect(picture, names)
    assert found.all_boxes.scores.dtype == np.float32 and len(found.all_boxes.scores) == 100
    assert not np.array_equal(found.all_boxes.scores, exact.all_boxes.scores)
    np.testing.assert_allclose(found.all_boxes.scores, exact.all_boxes.scores, atol=0.02)
    with pytest.raises(ValueError, match="expected torch.float32 or torch.bfloat16, got torch.float16"):
        VisionLLM(model.network, torch.float16)


def test_nothing_needs_gradients(model):
    result = model.detect(noise(32, 32), ["dog"])
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert result.boxes.scores.dtype == np.float32


def test_the_command_as_a_program(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    Image.fromarray(noise(60, 90)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    command = [
        sys.executable,
        "-m",
        "visionllm",
        "predict",
        str(tmp_path / "*.png"),
        "--classes",
        "dog,red car",
    ]
    command += ["--output", str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--threshold", "0"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "b.png: expected an image" in run.stderr and "Traceback" not in run.stderr
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(written["pictures"][0]["boxes"]) == 100
    with Image.open(tmp_path / "out" / "a.png") as annotated:
        assert annotated.size == (90, 60)
