"""Training batches of every task: what is asked for is what the pictures show, mirrored and cut ones too."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from visionllm.data.mixture import (
    CAPTION_TURNS,
    CLASS_TASKS,
    MORE_FORMATS,
    MORE_QUESTIONS,
    MOST_EXPRESSIONS,
    MOST_KEYPOINTS,
    Source,
    TrainingBatches,
    draw_points,
)
from visionllm.data.polygons import resample
from visionllm.data.scenes import SceneDataset
from visionllm.instruction import parse
from visionllm.instruction.instruction import TASKS

SIZE = 96
SHARES = dict.fromkeys(TASKS, 1.0)


class Photos:
    """Scenes as if they were photos: a few of them, without generated language."""

    def __init__(self, count=6):
        self.scenes = SceneDataset("train", seed=3, size=SIZE, length=count, outlines=True)

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        return self.scenes[index]


@pytest.fixture(scope="module")
def batches():
    scenes = SceneDataset("train", seed=1, size=SIZE, outlines=True, keypoints=True, language=True)
    sources = [
        Source(scenes, 2, name="scenes", tasks=TASKS),
        Source(Photos(), 1, photo=True, name="photos", tasks=("detection", "segmentation", "grounding")),
    ]
    made = TrainingBatches(sources, seed=2, batch_size=3, image_size=SIZE, tasks=SHARES)
    return [made[step] for step in range(60)]


def of_task(batches, task):
    found = [batch for batch in batches if batch.task == task]
    assert found
    return found


def test_the_tasks_have_their_shares():
    class Cheap:
        vocabulary = ("a", "b")

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return PICTURE

    PICTURE = replace(SceneDataset("train", seed=0, size=SIZE, language=True)[0], vocabulary=("a", "b"))
    source = Source(Cheap(), tasks=TASKS)
    made = TrainingBatches(
        [source], seed=0, batch_size=1, image_size=SIZE, tasks={"detection": 3, "captioning": 1, "vqa": 0}
    )
    counts = Counter(made[step].task for step in range(400))
    assert set(counts) == {"detection", "captioning"}
    assert abs(counts["captioning"] - 100) < 4 * (400 * 0.25 * 0.75) ** 0.5


def test_instructions_are_of_the_task_and_can_be_read(batches):
    for task in TASKS:
        for batch in of_task(batches, task):
            for instruction in batch.instructions:
                assert instruction.task == task
                assert parse(instruction.text).task == task
            assert (batch.points is not None) == (task in ("segmentation", "keypoints"))
            assert (batch.visibility is not None) == (task == "keypoints")
            assert len(batch.answers) == (3 if task in ("captioning", "vqa") else 0)


def test_outlines_lie_on_their_boxes(batches):
    """N points in 0..1 whose extent is in the object's box."""
    seen = set()
    for batch in of_task(batches, "segmentation"):
        points = batch.instructions[0].points
        assert {one.points for one in batch.instructions} == {points}
        seen.add(points)
        for outline, box in zip(batch.points, batch.boxes, strict=True):
            assert outline.shape == (len(box), points, 2) and outline.dtype == np.float32
            low, high = box[:, None, :2] - box[:, None, 2:] / 2, box[:, None, :2] + box[:, None, 2:] / 2
            slack = 1.5 / SIZE  # an outline goes around pixels' corners, a box may end within a pixel
            assert (outline >= low - slack).all() and (outline <= high + slack).all()
            # It is an outline of most of the object, not a point of it.
            if points >= 8 and len(box):
                extent = outline.max(1) - outline.min(1)
                assert np.median(extent / np.maximum(box[:, 2:], 1e-6)) > 0.6
    assert len(seen) > 1


def test_outlines_are_resampled_ones_of_the_picture():
    scenes = SceneDataset("train", seed=1, size=SIZE, outlines=True, length=6)
    source = Source(scenes, tasks=("segmentation",))
    batch = TrainingBatches(
        [source],
        seed=2,
        batch_size=2,
        image_size=SIZE,
        tasks={"segmentation": 1},
        prompts={"list_present": 1.0},
    )[0]
    points = batch.instructions[0].points
    for b in range(2):
        index = next(i for i in range(len(scenes)) if np.array_equal(scenes[i].image, batch.images[b]))
        wanted = [
            resample(outline, points) / SIZE for outline in scenes[index].outlines if outline is not None
        ]
        for outline in batch.points[b]:
            assert min(np.abs(outline - one).max() for one in wanted) < 1e-6


def test_keypoints_are_those_of_the_objects(batches):
    for batch in of_task(batches, "keypoints"):
        names = batch.instructions[0].keypoints
        assert 1 <= len(names) <= MOST_KEYPOINTS
        assert {one.keypoints for one in batch.instructions} == {names}
        for points, visibility, boxes in zip(batch.points, batch.visibility, batch.boxes, strict=True):
            assert points.shape == (len(boxes), len(names), 2) and visibility.shape == points.shape[:2]
            assert set(np.unique(visibility)) <= {0, 1, 2}
            assert (points[visibility == 0] == 0).all()
            known = visibility > 0
            low = np.broadcast_to((boxes[:, :2] - boxes[:, 2:] / 2)[:, None], points.shape)
            high = np.broadcast_to((boxes[:, :2] + boxes[:, 2:] / 2)[:, None], points.shape)
            # A point that another object hides may lie beside the box of what is seen of the object.
            seen = visibility == 2
            assert (points[seen] >= low[seen] - 3 / SIZE).all() and (
                points[seen] <= high[seen] + 3 / SIZE
            ).all()
            assert (points[known] >= -1).all() and (points[known] <= 2).all()
    assert any((batch.visibility[b] == 2).any() for batch in of_task(batches, "keypoints") for b in range(3))


def test_an_expression_means_one_answer(batches):
    absent = 0
    for batch in of_task(batches, "grounding"):
        for instruction, labels in zip(batch.instructions, batch.labels, strict=True):
            assert 1 <= len(instruction.classes) <= MOST_EXPRESSIONS
            assert len(set(instruction.classes)) == len(instruction.classes)
            absent += len(set(range(len(instruction.classes))) - set(labels.tolist()))
    assert absent > 0  # "nothing there" is taught too


def test_photos_are_spoken_of_as_they_are_seen():
    """Expressions of a view: 'the leftmost' is the one of the mirrored, cut picture."""
    source = Source(Photos(), photo=True, tasks=("grounding",))
    made = TrainingBatches([source], seed=4, batch_size=8, image_size=SIZE, tasks={"grounding": 1})
    checked = 0
    for step in range(8):
        batch = made[step]
        for instruction, labels, boxes in zip(batch.instructions, batch.labels, batch.boxes, strict=True):
            found = {instruction.classes[label]: box for label, box in zip(labels, boxes, strict=True)}
            for text, box in found.items():
                if "on the left" in text:
                    assert box[0] < 0.5
                    checked += 1
                elif "on the right" in text:
                    assert box[0] > 0.5
                    checked += 1
    assert checked > 3


def test_answers_are_those_of_the_pictures():
    scenes = SceneDataset("train", seed=1, size=SIZE, language=True, length=6)
    made = TrainingBatches(
        [Source(scenes, tasks=("captioning", "vqa"))],
        seed=2,
        batch_size=2,
        image_size=SIZE,
        tasks={"captioning": 1, "vqa": 1},
    )
    seen = Counter()
    for step in range(8):
        batch = made[step]
        seen[batch.task] += 1
        for b in range(2):
            index = next(i for i in range(len(scenes)) if np.array_equal(scenes[i].image, batch.images[b]))
            asked, sample = batch.instructions[b], scenes[index]
            if batch.task == "vqa":
                assert (asked.question, batch.answers[b]) in {(q.text, q.answer) for q in sample.questions}
            else:
                assert batch.answers[b] in sample.captions[asked.length]
            said = {(q.text, q.answer) for q in sample.questions} | {
                (CAPTION_TURNS[length], text) for length, texts in sample.captions.items() for text in texts
            }
            turns = batch.turns[b]
            assert 1 < len(turns) <= MORE_QUESTIONS + 1 and len(set(turns)) == len(turns)
            assert set(turns) <= said - {(asked.question, batch.answers[b])}
    assert len(seen) == 2


def test_only_lengths_that_there_are_captions_of_are_asked_for():
    scenes = SceneDataset("train", seed=1, size=SIZE, language=True, length=2)

    class Short:
        """As COCO's captions."""

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return replace(scenes[index], captions={"short": scenes[index].captions["short"]})

    source = Source(Short(), tasks=("captioning",))
    made = TrainingBatches([source], seed=0, batch_size=2, image_size=SIZE, tasks={"captioning": 1})
    assert {one.length for step in range(12) for one in made[step].instructions} == {"short"}


def test_formats_come_beside_words(batches):
    pairs = [pair for batch in batches for pair in batch.formats]
    assert all(
        len(batch.formats) == (0 if batch.task in (*CLASS_TASKS, "grounding") else MORE_FORMATS)
        for batch in batches
    )
    assert len(set(pairs)) > len(pairs) / 2
    for text, format in pairs[:20]:
        assert "<image>" in text and format.startswith("(c, x1, y1")


def test_numbers_of_points():
    rng = np.random.default_rng(0)
    counts = Counter(draw_points(rng) for _ in range(4000))
    assert min(counts) == 4 and max(counts) == 64
    assert counts[16] > 4000 * 0.7 / 6


def test_whole_photos_are_not_changed():
    scenes = SceneDataset("train", seed=1, size=SIZE, language=True, length=4)
    source = Source(scenes, photo=True, whole=True, tasks=("captioning",))
    batch = TrainingBatches([source], seed=0, batch_size=4, image_size=SIZE, tasks={"captioning": 1})[0]
    pictures = [scenes[i].image for i in range(4)]
    assert all(any(np.array_equal(image, one) for one in pictures) for image in batch.images)
    assert batch.photo == [True] * 4


def test_pictures_without_keypoints_are_passed_over():
    scenes = SceneDataset("train", seed=1, size=SIZE, keypoints=True, length=4)

    class Half:
        vocabulary = scenes.names

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return scenes[index] if index % 2 else replace(scenes[index], keypoints=None)

    made = TrainingBatches(
        [Source(Half(), tasks=("keypoints",))], seed=0, batch_size=2, image_size=SIZE, tasks={"keypoints": 1}
    )
    for step in range(4):
        assert all(np.isfinite(points).all() for points in made[step].points)
