"""Calibration: the threshold with the best F1, the power with the best AP, and the model that is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_network import small_network

from visionllm.data.sample import Sample
from visionllm.model.network import Detections, Network
from visionllm.train.calibrate import KNOWN_POWERS, POWERS, best_threshold, calibrate, fit_router, main
from visionllm.train.validation import ValidationSet

GROUND_TRUTH = {
    "images": [{"id": 0}, {"id": 1}],
    "categories": [{"id": 1}, {"id": 2}],
    "annotations": [
        {"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [5, 5, 10, 10], "area": 100, "iscrowd": 0},
    ],
}


def answer(image: int, category: int, box: list[float], score: float) -> dict:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def test_the_threshold_keeps_the_hits_and_drops_what_is_below():
    predictions = [
        answer(0, 1, [0, 0, 10, 10], 0.9),
        answer(1, 2, [5, 5, 10, 9], 0.6),
        answer(1, 1, [5, 5, 10, 10], 0.5),  # another class
        answer(0, 1, [0, 0, 10, 9], 0.4),  # the same object again
    ]
    assert best_threshold(GROUND_TRUTH, predictions) == (0.6, 1.0)


def test_the_threshold_drops_a_false_answer_above_no_hit():
    predictions = [answer(0, 1, [0, 0, 10, 10], 0.9), answer(0, 1, [40, 40, 5, 5], 0.8)]
    score, f1 = best_threshold(GROUND_TRUTH, predictions)
    assert score == 0.9 and f1 == pytest.approx(2 / 3)


@pytest.mark.parametrize("truth", [GROUND_TRUTH, {**GROUND_TRUTH, "annotations": []}])
def test_nothing_to_choose_from(truth):
    assert best_threshold(truth, []) == (0.0, 0.0)


class Weighing:
    """Stands for a network whose right boxes have high objectness and wrong ones high class scores."""

    def __init__(self) -> None:
        self.config, self.known_names = small_network().config, ()

    def parameters(self):
        yield torch.zeros(1)

    def find(self, images, instructions, top):
        a = self.config.objectness_power
        boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]])
        scores = torch.tensor([0.9**a * 0.3 ** (1 - a), 0.1**a * 0.8 ** (1 - a)])
        order = scores.argsort(descending=True)
        labels, bins = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
        points = boxes[order].unflatten(1, (2, 2))
        one = Detections(boxes[order], scores[order], labels, boxes[order, :2], bins, points)
        return [one] * len(images)


@pytest.fixture
def sample() -> Sample:
    return Sample(
        image=np.zeros((20, 20, 3), np.uint8),
        boxes=np.array([[2, 2, 10, 10]], np.float32),
        names=["dog"],
        area=np.array([64], np.float32),
        iscrowd=np.zeros(1, bool),
        image_id=0,
        vocabulary=("dog",),
    )


def test_the_power_that_puts_right_boxes_first_is_chosen(sample):
    network = Weighing()
    config = calibrate(network, [ValidationSet("one", [sample], 1, None, 20)])
    power, threshold = config.objectness_power, config.score_threshold
    assert power == max(POWERS)
    assert threshold == pytest.approx(0.9**power * 0.3 ** (1 - power), abs=5e-4)
    assert network.config.objectness_power == small_network().config.objectness_power


class Knowing(Weighing):
    """Has a false box above the right one, which known names push down; too much of them, the right one."""

    def __init__(self) -> None:
        super().__init__()
        self.known_names = ("cat",)

    def find(self, images, instructions, top):
        found = super().find(images, instructions, top)
        for one in found:
            c = self.config.known_power
            right = one.boxes[:, 0] < 0.5
            one.scores = torch.where(right, 0.5 if c <= 0.75 else 0.0, 0.9 * 0.2**c)
        return found


def test_the_largest_known_power_that_costs_nothing_is_chosen(sample):
    config = calibrate(Knowing(), [ValidationSet("one", [sample], 1, None, 20)])
    # 0.9 · 0.2^c < 0.5 from c = 0.37 on
    assert config.known_power == 0.75 in KNOWN_POWERS
    assert config.score_threshold == 0.5


def test_the_command_writes_a_model_in_bfloat16(tmp_path, capsys):
    small_network().save_pretrained(tmp_path / "trained")
    arguments = ["--model", str(tmp_path / "trained"), "--output", str(tmp_path / "shipped"), "--count", "2"]
    assert main(arguments) == 0
    trained, shipped = (Network.from_pretrained(tmp_path / name) for name in ("trained", "shipped"))
    assert shipped.config.objectness_power in POWERS
    assert str(shipped.config.objectness_power) in capsys.readouterr().out
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("trained", "shipped")]
    assert 1.8 < sizes[0] / sizes[1] < 2.2
    for old, new in zip(trained.parameters(), shipped.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=2**-8, atol=0)


def test_the_router_is_fitted_to_tell_photos_from_drawings():
    network = small_network(keep_pretrained=True)

    class Brightness(torch.nn.Module):
        """A trunk whose pretrained C5 holds noise and, in one channel, how bright the picture is."""

        pretrained = True  # it has such stages

        def first_stages(self, x):
            self.brightness = x.mean((1, 2, 3))
            return torch.zeros(len(x), 40, 4, 4)

        def late_stages(self, x, pretrained=False):
            c4, c5 = torch.zeros(len(x), 112, 2, 2), torch.zeros(len(x), 320, 1, 1)
            if pretrained:
                generator = torch.Generator().manual_seed(int(1000 * (2 + self.brightness.mean())))
                c5 = torch.rand(len(x), 320, 1, 1, generator=generator)
                c5[:, 20:] = 0.25
                c5[:, 7] = self.brightness[:, None, None]
            return [c4, c5]

    network.image_tokenizer.backbone = Brightness()

    def some(low, high, count, seed):
        rng = np.random.default_rng(seed)
        return [np.full((8, 8, 3), rng.integers(low, high), np.uint8) for _ in range(count)]

    assert fit_router(network, some(0, 120, 500, 0), some(136, 256, 500, 1)) < 0.02
    with torch.no_grad():
        for low, high, drawn in ((0, 110, False), (146, 256, True)):
            images = torch.from_numpy(np.stack(some(low, high, 20, 2)))
            assert ((network.image_tokenizer.pyramid(images)[1] > 0) == drawn).float().mean() >= 0.9
