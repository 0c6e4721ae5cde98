"""Calibration: the threshold with the best F1, the power with the best AP, and the model that is written."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small_network import small_network

from visionllm.data.sample import Sample
from visionllm.model.network import Network
from visionllm.train.calibrate import (
    PART_FACTOR,
    POWERS,
    REPEAT_FACTOR,
    Absent,
    Candidates,
    Outcome,
    calibrate,
    candidates,
    choose,
    fit_router,
    main,
    mean_of,
    measure,
    rank,
)
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
    assert rank(GROUND_TRUTH, predictions).best_threshold() == (0.6, 1.0)


def test_the_threshold_drops_a_false_answer_above_no_hit():
    predictions = [answer(0, 1, [0, 0, 10, 10], 0.9), answer(0, 1, [40, 40, 5, 5], 0.8)]
    score, f1 = rank(GROUND_TRUTH, predictions).best_threshold()
    assert score == 0.9 and f1 == pytest.approx(2 / 3)


@pytest.mark.parametrize("truth", [GROUND_TRUTH, {**GROUND_TRUTH, "annotations": []}])
def test_nothing_to_choose_from(truth):
    assert rank(truth, []).best_threshold() == (0.0, 0.0)


def test_the_score_that_finds_a_share_of_the_objects():
    predictions = [
        answer(0, 1, [0, 0, 10, 10], 0.9),
        answer(1, 1, [5, 5, 10, 10], 0.7),
        answer(1, 2, [5, 5, 10, 9], 0.6),
    ]
    ranking = rank(GROUND_TRUTH, predictions)
    assert [ranking.score_that_finds(share) for share in (0.5, 0.8, 1.0)] == [0.9, 0.6, 0.6]
    assert rank(GROUND_TRUTH, predictions[:2]).score_that_finds(0.8) == 0.0  # one of two is never found


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


def two(known: tuple[float, float]) -> Candidates:
    """A right box of high objectness, and a wrong one of a higher class score."""
    return Candidates(
        boxes=torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]]),
        labels=torch.zeros(2, dtype=torch.int64),
        objectness=torch.tensor([0.9, 0.1]),
        probability=torch.tensor([0.3, 0.8]),
        known=torch.tensor(known),
    )


@pytest.mark.parametrize(("a", "c"), [(0.15, 0.0), (0.7, 0.0), (0.15, 0.5)])
def test_powers_are_measured(sample, a, c):
    one = ValidationSet("one", [sample], 1, None, 20)
    config = dataclasses.replace(small_network().config, objectness_power=a, known_power=c)
    outcome = measure(config, [(one, [two(known=(0.9, 0.1))])], [two(known=(0.01, 0.01))])
    right = 0.9**a * 0.3 ** (1 - a) * 0.9**c
    wrong = 0.1**a * 0.8 ** (1 - a) * 0.1**c
    assert outcome.precision == pytest.approx(1.0 if right > wrong else 0.5)
    assert outcome.threshold == pytest.approx(right)
    assert outcome.shown == (c == 0)  # known names speak against both


def test_of_what_is_nearly_the_best_the_one_that_shows_least_is_chosen():
    def outcome(precision, shown):
        return Outcome(small_network().config, precision, 0.4, shown)

    outcomes = [outcome(0.5, 0.06), outcome(0.498, 0.02), outcome(0.499, 0.02), outcome(0.49, 0.0)]
    assert choose(outcomes) is outcomes[2]


def test_scores_are_those_that_the_network_gives():
    names = ("dog", "red car", "cup")
    network = small_network()
    network.known_names = ("dog", "cat", "tree")
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    some = Sample(
        image=picture,
        boxes=np.zeros((0, 4), np.float32),
        names=[],
        area=np.zeros(0, np.float32),
        iscrowd=np.zeros(0, bool),
        image_id=0,
        vocabulary=names,
    )
    one = ValidationSet("one", [some], 1, None, 64)
    network.config = dataclasses.replace(
        network.config, objectness_power=0.55, known_power=0.35, repeat_factor=0.5
    )
    (mine,) = candidates(network, one)
    assert network.config.known_power == 0.35
    found = mine.found(network.config, top=30)
    (there,) = network.find(torch.from_numpy(picture)[None], one.pictures[0].asked.instructions, top=30)
    np.testing.assert_allclose([score for _, score, _ in found], there.scores, rtol=2e-4)
    np.testing.assert_allclose(np.array([box for box, _, _ in found])[0], there.boxes[0], atol=1e-4)


def test_pictures_asked_for_absent_names_only(sample):
    sample.vocabulary = ("cat", "dog", "tree")
    one = ValidationSet("absent", Absent([sample]), 1, 20, 20)
    assert set(one.pictures[0].asked.classes) == {"cat", "tree"}
    assert one.ground_truth["annotations"] == []


def test_a_network_is_calibrated(sample):
    sample.vocabulary = ("dog", "cat")
    network = small_network()
    one, absent = (ValidationSet("one", samples, 1, None, 64) for samples in ([sample], Absent([sample])))
    config = calibrate(network, [one], absent)
    assert config.known_power == 0.0 and not network.known_names
    assert (config.repeat_factor, config.part_factor) in [(REPEAT_FACTOR, PART_FACTOR), (1.0, 1.0)]
    chosen = ("objectness_power", "known_power", "score_threshold", "repeat_factor", "part_factor")
    same = {name: getattr(config, name) for name in chosen}
    assert dataclasses.replace(network.config, **same) == config


@pytest.mark.parametrize(("objects", "factors"), [(1, (REPEAT_FACTOR, PART_FACTOR)), (2, (1.0, 1.0))])
def test_repeats_count_less_unless_that_costs(sample, monkeypatch, objects, factors):
    """The second box says the first one again, or is of another object; the third one is wrong."""
    boxes = np.array([[2, 2, 10, 10], [2.4, 2, 10.4, 10], [14, 14, 18, 18]], np.float32)
    sample.boxes, sample.names = boxes[:objects], ["dog"] * objects
    sample.area, sample.iscrowd = np.full(objects, 64, np.float32), np.zeros(objects, bool)
    sure = torch.tensor([0.9, 0.8, 0.6])  # half of 0.8 is less than 0.6
    seen = Candidates(
        torch.from_numpy(boxes / 20), torch.zeros(3, dtype=torch.int64), sure, sure, torch.ones(3)
    )
    monkeypatch.setattr("visionllm.train.calibrate.candidates", lambda *_: [seen])
    config = calibrate(small_network(), [ValidationSet("one", [sample], 1, None, 20)])
    assert (config.repeat_factor, config.part_factor) == factors


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


def test_the_mean_of_several_folders(tmp_path):
    networks = [small_network(seed) for seed in range(3)]
    folders = [str(tmp_path / str(seed)) for seed in range(3)]
    for network, folder in zip(networks, folders, strict=True):
        network.save_pretrained(folder)
    mean = mean_of(folders).state_dict()
    for name, tensor in networks[0].state_dict().items():
        expected = torch.stack([network.state_dict()[name].double() for network in networks]).mean(0)
        assert torch.allclose(mean[name].double(), expected, atol=1e-6), name
        assert mean[name].dtype == tensor.dtype
    assert all(
        torch.equal(mean_of(folders[:1]).state_dict()[n], t) for n, t in networks[0].state_dict().items()
    )
    small_network(keep_pretrained=True).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other: expected the tensors of .*0, got another"):
        mean_of([folders[0], str(tmp_path / "other")])
