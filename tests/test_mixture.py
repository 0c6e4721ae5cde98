"""Training batches: reproducible from (seed, step, rank), honest about what is absent or unknown."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from visionllm.data.class_set import PromptSettings, draw_class_set, draw_count, draw_range
from visionllm.data.mixture import Source, TrainingBatches, targets_of
from visionllm.data.sample import Sample
from visionllm.instruction import TRAIN_TEMPLATES, parse

SHAPE_NAMES = tuple(f"{colour} {shape}" for colour in ("red", "blue", "green", "old")
                    for shape in ("circle", "square", "star", "cross", "ring", "arrow"))  # fmt: skip
PHOTO_NAMES = tuple(f"animal {i}" for i in range(10))


class Pictures:
    """Pictures with random boxes; every object carries a pixel value that tells its picture's index."""

    def __init__(self, names, count=1000, size=48, crowds=False):
        self.vocabulary = names
        self.count, self.size, self.crowds = count, size, crowds

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng(index)
        n = int(rng.integers(0, 7))
        corner = rng.uniform(0, self.size * 0.7, (n, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(4, self.size * 0.3, (n, 2))], axis=1).astype(
            np.float32
        )
        return Sample(
            image=np.full((self.size, self.size, 3), index % 251, np.uint8),
            boxes=boxes,
            names=[self.vocabulary[i] for i in rng.integers(0, len(self.vocabulary), n)],
            area=np.ones(n, np.float32),
            iscrowd=rng.random(n) < (0.3 if self.crowds else 0),
            image_id=index,
            vocabulary=self.vocabulary,
        )


def mixture(**changes):
    sources = [
        Source(Pictures(SHAPE_NAMES), weight=3, name="scenes"),
        Source(Pictures(PHOTO_NAMES, count=7, size=80, crowds=True), weight=1, photo=True, name="photos"),
    ]
    arguments = {"seed": 5, "batch_size": 6, "image_size": 48} | changes
    return TrainingBatches(arguments.pop("sources", sources), **arguments)


def assert_equal(first, second):
    np.testing.assert_array_equal(first.images, second.images)
    for name in ("boxes", "labels", "ignore", "unlisted"):
        for a, b in zip(getattr(first, name), getattr(second, name), strict=True):
            np.testing.assert_array_equal(a, b)
    assert first.instructions == second.instructions
    assert [i.text for i in first.instructions] == [i.text for i in second.instructions]
    assert first.source == second.source


def test_a_batch_is_a_function_of_seed_step_and_rank():
    first = mixture()
    batches = {step: first[step] for step in (0, 1, 2, 30)}
    second = mixture()
    for step in (30, 2, 0, 1):  # another order, nothing before it
        assert_equal(second[step], batches[step])
    assert_equal(pickle.loads(pickle.dumps(second))[1], batches[1])
    pictures = {batches[step].images.tobytes() for step in batches}
    assert len(pictures) == 4
    assert not np.array_equal(mixture(seed=6)[0].images, batches[0].images)
    other_rank = mixture(rank=1, world_size=2)[0]
    assert not np.array_equal(other_rank.images, batches[0].images)
    assert len(other_rank.instructions[0].classes) == len(batches[0].instructions[0].classes)
    for step, batch in zip(range(2), first, strict=False):
        assert_equal(batch, batches[step])


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulate"),
    [(6, 2, 1), (3, 4, 1), (3, 2, 2), (2, 3, 2), (12, 1, 1), (4, 1, 3)],
)
def test_no_picture_is_left_out_or_drawn_twice_however_a_step_is_divided(batch_size, world_size, accumulate):
    """Indices that the data sets are asked for, counted over all processes."""

    class Counted(Pictures):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    def drawn(step, **divided):
        asked.clear()
        pictures = []
        for rank in range(divided.get("world_size", 1)):
            made = mixture(sources=[Source(Counted(SHAPE_NAMES), name="scenes")], rank=rank, **divided)
            parts = divided.get("accumulate", 1)
            for part in range(parts):
                batch = made[step * parts + part]
                pictures += [
                    (image.tobytes(), boxes.shape)
                    for image, boxes in zip(batch.images, batch.boxes, strict=True)
                ]
        return sorted(asked), len(pictures)

    asked: list[int] = []
    divided = {"batch_size": batch_size, "world_size": world_size, "accumulate": accumulate}
    for step in range(5):
        expected, count = drawn(step, batch_size=12)
        assert count == 12
        assert drawn(step, **divided) == (expected, 12)
        assert len(set(expected)) > 6  # of 1000 pictures: not one of them again and again


def test_shapes_and_types():
    batches = mixture()
    for step in range(20):
        batch = batches[step]
        assert batch.images.shape == (6, 48, 48, 3)
        assert batch.images.dtype == np.uint8
        for boxes, labels, ignore, instruction in zip(
            batch.boxes, batch.labels, batch.ignore, batch.instructions, strict=True
        ):
            assert boxes.dtype == ignore.dtype == np.float32
            assert labels.dtype == np.int64
            assert boxes.shape == (len(labels), 4)
            assert ignore.shape[1] == 4
            assert (boxes[:, 2:] > 0).all()
            assert (boxes[:, :2] - boxes[:, 2:] / 2 > -1e-6).all()
            assert (boxes[:, :2] + boxes[:, 2:] / 2 < 1 + 1e-6).all()
            assert ((labels >= 0) & (labels < len(instruction.classes))).all()
            assert parse(instruction.text) == instruction


def test_photos_list_names_of_other_sources_when_asked():
    batches = mixture(prompts={"foreign_names": 0.5, "large_share": 0.0, "middle_share": 0.0})
    plain = mixture(prompts={"large_share": 0.0, "middle_share": 0.0})
    mixed = prompts = 0
    for step in range(150):
        for found, usual in zip(_prompts(batches[step]), _prompts(plain[step]), strict=True):
            source, classes, present = found
            if source == "scenes":
                assert found == usual and set(classes) <= set(SHAPE_NAMES)
                continue
            assert set(present) <= set(PHOTO_NAMES) and set(usual[1]) <= set(PHOTO_NAMES)
            prompts += 1
            mixed += not set(classes) <= set(PHOTO_NAMES)
    assert prompts > 40 and 0.3 < mixed / prompts < 0.65


def _prompts(batch):
    """Per picture: its source, the listed names, and those of them that have boxes."""
    return [
        (source, instruction.classes, [instruction.classes[label] for label in labels])
        for source, instruction, labels in zip(batch.source, batch.instructions, batch.labels, strict=True)
    ]


def test_one_template_and_one_number_of_names_per_step():
    batches = mixture(prompts={"middle_share": 0.3, "middle_count": (8, 16), "large_share": 0.1})
    wordings = {template.text for template in TRAIN_TEMPLATES["detection"]}
    used = set()
    for step in range(30):
        instructions = batches[step].instructions
        assert len({len(instruction.classes) for instruction in instructions}) == 1
        assert len({instruction.coordinates for instruction in instructions}) == 1
        used |= {text for text in wordings if instructions[0].text.startswith(text.split("<")[0])}
    assert len(used) > 5


def test_targets_are_the_listed_objects():
    """Pictures are told by their pixel value, so every target can be traced back to its object."""
    scenes = Pictures(SHAPE_NAMES, count=200)
    batches = mixture(sources=[Source(scenes, name="s")], prompts={"max_objects": 3})
    listed_targets = unlisted = 0
    for step in range(30):
        batch = batches[step]
        for i, instruction in enumerate(batch.instructions):
            truth = scenes[int(batch.images[i, 0, 0, 0])]
            got = Counter(instruction.classes[k] for k in batch.labels[i])
            there = Counter(name for name in truth.names if name in instruction.classes)
            assert not got - there
            assert sum(got.values()) == min(3, sum(there.values()))
            assert len(batch.unlisted[i]) == len(truth.names) - sum(there.values())
            assert len(batch.ignore[i]) == sum(there.values()) - sum(got.values())
            for box, label in zip(batch.boxes[i], batch.labels[i], strict=True):
                corners = np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2]) * 48
                match = np.abs(truth.boxes - corners).max(1) < 1e-3
                assert [n for n, m in zip(truth.names, match, strict=True) if m] == [
                    instruction.classes[label]
                ]
            areas = batch.boxes[i][:, 2] * batch.boxes[i][:, 3]
            assert (np.diff(areas) <= 0).all()
            listed_targets += sum(got.values())
            unlisted += len(truth.names) - sum(there.values())
    assert listed_targets > 100
    assert unlisted > 50


def test_the_share_of_the_sources_follows_the_weights():
    batches = mixture(prompts={"middle_share": 0, "large_share": 0, "usual_count": (2, 4, 8)})
    counts = Counter(name for step in range(150) for name in batches[step].source)
    assert counts["photos"] / 900 == pytest.approx(0.25, abs=0.05)


def test_long_prompts_are_for_sources_with_enough_names():
    everything = mixture(prompts={"large_share": 1.0, "middle_count": (15, 20)})
    for step in range(20):
        batch = everything[step]
        assert set(batch.source) == {"scenes"}
        assert 15 <= len(batch.instructions[0].classes) <= len(SHAPE_NAMES)
    middle = mixture(prompts={"large_share": 0.0, "middle_share": 1.0, "middle_count": (15, 20)})
    counts = {step: len(middle[step].instructions[0].classes) for step in range(30)}
    assert 10 in counts.values()  # all names of the photos
    for step, count in counts.items():
        assert count == 10 or set(middle[step].source) == {"scenes"}


def test_a_picture_that_knows_fewer_names_shortens_the_batch():
    class Narrow(Pictures):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return replace(sample, vocabulary=self.vocabulary[:6])

    batches = mixture(sources=[Source(Narrow(PHOTO_NAMES))], prompts={"usual_count": (10, 10, 10.1)})
    for step in range(5):
        assert 6 <= len(batches[step].instructions[0].classes) <= 10

    class Mixed(Pictures):  # some of the pictures know all names: long prompts look for those
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return replace(sample, vocabulary=self.vocabulary if index % 2 else self.vocabulary[:6])

    batches = mixture(sources=[Source(Mixed(PHOTO_NAMES))], prompts={"usual_count": (10, 10, 10.1)})
    lengths = [len(batches[step].instructions[0].classes) for step in range(20)]
    assert lengths.count(10) >= 18
    short = mixture(
        sources=[Source(Mixed(PHOTO_NAMES))],
        prompts={"usual_count": (4, 5, 6), "middle_share": 0, "large_share": 0},
    )
    known = [int(image[0, 0, 0]) % 2 for step in range(20) for image in short[step].images]
    assert 0.3 < np.mean(known) < 0.7


@pytest.mark.parametrize("seed", range(5))
def test_class_sets(seed):
    rng = np.random.default_rng(seed)
    settings = PromptSettings()
    present, unclear = ["red circle", "blue star", "red circle"], ["old ring"]
    listed = Counter()
    first = Counter()
    empty = 0
    for _ in range(400):
        names = draw_class_set(present, unclear, SHAPE_NAMES, 8, rng, settings)
        assert len(set(names)) == 8
        assert set(names) <= set(SHAPE_NAMES)
        assert "old ring" not in names  # neither present nor absent
        listed.update(set(present).intersection(names))
        first[names.index("red circle") if "red circle" in names else -1] += 1
        empty += not set(present).intersection(names)
    expected = (1 - settings.only_absent) * settings.list_present
    for name in set(present):
        assert listed[name] / 400 == pytest.approx(expected, abs=0.07)
    assert empty / 400 == pytest.approx(settings.only_absent, abs=0.04)
    assert min(first[k] for k in range(8)) > 15  # any place in the order


def test_similar_names_are_preferred_when_asked():
    def similar_share(hard):
        rng = np.random.default_rng(0)
        settings = PromptSettings(hard_negatives=hard, only_absent=0)
        names = [
            n for _ in range(200) for n in draw_class_set(["red circle"], [], SHAPE_NAMES, 6, rng, settings)
        ]
        absent = [name for name in names if name != "red circle"]
        return sum("red" in name.split() or "circle" in name.split() for name in absent) / len(absent)

    assert similar_share(0.0) == pytest.approx(8 / 23, abs=0.05)
    assert similar_share(1.0) > 0.6


def test_a_class_set_of_everything():
    rng = np.random.default_rng(0)
    names = draw_class_set(["a"], ["b"], ("a", "c", "d"), 4, rng, PromptSettings())
    assert sorted(names) == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="count: expected at most 4 names, got 5"):
        draw_class_set(["a"], ["b"], ("a", "c", "d"), 5, rng, PromptSettings())


def test_numbers_of_names_and_ranges():
    rng = np.random.default_rng(0)
    draws = [draw_count(rng, 330, PromptSettings()) for _ in range(4000)]
    counts = {kind: [c for c, k in draws if k == kind] for kind in ("usual", "middle", "large")}
    assert (min(counts["usual"]), max(counts["usual"])) == (4, 30)
    assert min(counts["middle"]) >= 60
    assert max(counts["middle"]) <= 120
    assert counts["large"].count(330) / len(counts["large"]) == pytest.approx(0.5, abs=0.12)
    assert len(counts["middle"]) / 4000 == pytest.approx(0.10, abs=0.02)
    assert len(counts["large"]) / 4000 == pytest.approx(0.05, abs=0.02)
    assert max(draw_count(rng, 9, PromptSettings())[0] for _ in range(200)) == 9
    ranges = [draw_range(rng, PromptSettings()) for _ in range(1000)]
    assert ranges.count(512) / 1000 == pytest.approx(0.6, abs=0.06)
    assert (min(ranges) >= 100) and (max(ranges) <= 2000) and (len(set(ranges)) > 100)


def test_targets_of_clips_and_drops():
    sample = Sample(
        image=np.zeros((10, 20, 3), np.uint8),
        boxes=np.array([[-5, 0, 10, 5], [4, 4, 4, 9], [0, 0, 20, 10], [1, 1, 2, 2]], np.float32),
        names=["a", "a", "b", "c"],
        area=np.ones(4, np.float32),
        iscrowd=np.array([False, False, True, False]),
        image_id=0,
        vocabulary=("a", "b", "c"),
    )
    found = targets_of(sample, ("b", "a"), 5)
    boxes, labels, ignore = found.boxes, found.labels, found.ignore
    unlisted = found.unlisted
    np.testing.assert_allclose(boxes, [[0.25, 0.25, 0.5, 0.5]])
    assert labels.tolist() == [1]
    np.testing.assert_allclose(ignore, [[0.5, 0.5, 1, 1]])
    np.testing.assert_allclose(unlisted, [[0.075, 0.15, 0.05, 0.1]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "sources: expected at least one"),
        ({"sources": [Source(Pictures(SHAPE_NAMES), weight=-1)]}, "sources: expected finite weights"),
        (
            {"sources": [Source(Pictures(SHAPE_NAMES, count=0), name="nothing")]},
            "sources: expected samples in 'nothing'",
        ),
        ({"rank": 2, "world_size": 2}, "rank: expected"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"prompts": {"mx_objects": 3}}, "prompts: expected one of .* got 'mx_objects'"),
        ({"templates": {"detection": []}}, "templates: expected at least one"),
        ({"tasks": {"vqa": 1.0}}, "tasks: expected some of detection, got 'vqa'"),
        ({"tasks": {"detection": 0.0}}, "tasks: expected finite shares >= 0, not all 0"),
    ],
)
def test_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        mixture(**changes)
