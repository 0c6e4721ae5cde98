"""Training batches from several data sets, with random prompts: a pure function of (seed, step, number).

A step's pictures come in micro-batches, numbered over all processes: who makes which is of no account.
Nothing depends on which batches were made before, so that a run resumes anywhere, on another number of
processes too, and processes share no state. The task, the template (but for captions of a length that a
picture lacks) and the number of listed names are the same for all samples of a step, on all ranks: nothing is
padded for want of names, and no rank waits for another's longer prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from visionllm.data.class_set import PromptSettings, draw_class_set, draw_count, draw_range
from visionllm.data.expressions import derived_expressions
from visionllm.data.photo_augmentation import (
    AugmentedPhotos,
    PhotoAugmentation,
    SampleSource,
    resize,
    view_size,
)
from visionllm.data.polygons import resample
from visionllm.data.sample import Sample
from visionllm.data.train_batch import TrainBatch
from visionllm.image import padded_pictures
from visionllm.instruction import TRAIN_TEMPLATES, Template
from visionllm.instruction.format_phrasings import FormatPhrasing, training_phrasings
from visionllm.instruction.instruction import MAX_CLASSES

STEP_STREAM, SAMPLE_STREAM = 0, 1  # independent random streams
CLASS_TASKS = ("detection", "segmentation", "keypoints")  # that list class names
# What is asked of a picture behind the first answer: a pass over it teaches several times as much.
MORE_QUESTIONS = 9
CAPTION_TURNS = {
    "short": "Write a short caption.",
    "long": "Write a long caption.",
    "detailed": "Write a detailed description.",
}
MOST_KEYPOINTS, MOST_EXPRESSIONS = 8, 6  # in a prompt
MORE_FORMATS = 8  # instructions whose output format is asked for beside a batch of captions or answers
DRAWS = 8  # attempts to find a picture that knows enough names for a long prompt


@dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    Attributes:
        dataset: samples by index.
        weight: share of the samples, relative to the other sources.
        photo: a finite set of photos; otherwise they are generated pictures.
        name: for logs.
        tasks: that its samples can be asked for.
        whole: its photos are taken as they are; otherwise views of them are drawn with augmentation, and
            expressions are made from what a view shows.
    """

    dataset: SampleSource
    weight: float = 1.0
    photo: bool = False
    name: str = ""
    tasks: tuple[str, ...] = ("detection",)
    whole: bool = False


class TrainingBatches:
    """``batches[step]`` is rank ``rank``'s `TrainBatch` of that step; ``batches[i]`` its i-th micro-batch.

    Micro-batch k of rank r has number k * world_size + r in its step, and the pictures of places
    number * batch_size on: what a place draws depends on (seed, step, place) alone. Names are listed as many
    for all pictures of a micro-batch, so prompts are the same where its size is.

    Args:
        sources: the data sets with their weights.
        seed: of everything drawn.
        batch_size: pictures of a micro-batch.
        image_size: side S in pixels.
        rank, world_size: which of how many processes this is.
        accumulate: micro-batches per rank and step.
        prompts: how prompts are drawn; a mapping changes single fields of the default.
        augmentation: of photos; a mapping likewise.
        templates: instruction templates by task; those for training by default.
        descriptions: of the templates of each task only so many, the first ones; 0: all.
        tasks: each with its share of the steps; detection alone by default. Every task needs a source.
        cache_bytes: memory for decoded photos, per source.
        longest_side: of the network; with it photos keep their shape, and batches are padded.

    Raises:
        ValueError: an argument is out of range; it is named.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int,
        batch_size: int,
        image_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        prompts: PromptSettings | Mapping[str, Any] | None = None,
        augmentation: PhotoAugmentation | Mapping[str, Any] | None = None,
        templates: Mapping[str, Sequence[Template]] | None = None,
        descriptions: int = 0,
        tasks: Mapping[str, float] | None = None,
        cache_bytes: int = 1 << 30,
        longest_side: int = 0,
    ) -> None:
        if not sources:
            raise ValueError("sources: expected at least one, got none")
        weights = np.array([source.weight for source in sources], np.float64)
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise ValueError(f"sources: expected finite weights >= 0, not all 0, got {weights.tolist()}")
        for name, value, least in (
            ("seed", seed, 0),
            ("batch_size", batch_size, 1),
            ("image_size", image_size, 1),
            ("accumulate", accumulate, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 <= rank < world_size = {world_size}, got {rank}")
        self.sources = [source for source in sources if source.weight > 0]
        for source in self.sources:
            if len(source.dataset) == 0:
                raise ValueError(f"sources: expected samples in {source.name or source.dataset!r}, got none")
        self.seed, self.batch_size, self.image_size = seed, batch_size, image_size
        self.longest_side = longest_side
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.prompts = _settings(PromptSettings, prompts, "prompts")
        self.augmentation = _settings(PhotoAugmentation, augmentation, "augmentation")
        self.tasks = {task: share for task, share in (tasks or {"detection": 1.0}).items() if share > 0}
        offered = {task for source in self.sources for task in source.tasks}
        if not self.tasks or not all(np.isfinite(share) for share in self.tasks.values()):
            raise ValueError(f"tasks: expected finite shares >= 0, not all 0, got {tasks}")
        for task in self.tasks:
            if task not in offered:
                raise ValueError(f"tasks: expected some of {', '.join(sorted(offered))}, got {task!r}")
        wordings = TRAIN_TEMPLATES if templates is None else templates
        self.templates = {task: list(wordings[task])[: descriptions or None] for task in self.tasks}
        if not all(self.templates.values()):
            raise ValueError("templates: expected at least one for each task, got none for one")
        self._photos = [
            AugmentedPhotos(source.dataset, image_size, self.augmentation, cache_bytes, longest_side)
            if source.photo and not source.whole
            else None
            for source in self.sources
        ]
        self._weights = weights[weights > 0]
        vocabularies = [tuple(dict.fromkeys(vocabulary_of(source))) for source in self.sources]
        longest = max(map(len, vocabularies))
        if not self.prompts.random_classes and longest > MAX_CLASSES:
            raise ValueError(
                f"prompts.random_classes: without it a source may have {MAX_CLASSES} names, got {longest}"
            )
        self._vocabularies = vocabularies
        everything = dict.fromkeys(name for names in vocabularies for name in names)
        self._foreign = [
            tuple(name for name in everything if name not in own) for own in map(frozenset, vocabularies)
        ]
        self._capacities = np.array([len(set(names)) for names in vocabularies])

    def __iter__(self) -> Iterator[TrainBatch]:
        """All of this rank's micro-batches from step 0 on, without end."""
        index = 0
        while True:
            yield self[index]
            index += 1

    def __getitem__(self, index: int) -> TrainBatch:
        if index < 0:
            raise IndexError(f"step: expected at least 0, got {index}")
        step, part = divmod(index, self.accumulate)
        first = (part * self.world_size + self.rank) * self.batch_size
        step_rng = self._rng(STEP_STREAM, step)
        task = self._draw_task(step_rng)
        templates = self.templates[task]
        template = templates[step_rng.integers(len(templates))]
        offers = np.array([task in source.tasks for source in self.sources])
        if task in CLASS_TASKS:
            capacities = self._capacities[offers]
            most = min(int(capacities.max()), MAX_CLASSES)
            if self.prompts.random_classes:
                count, kind = draw_count(step_rng, most, self.prompts)
            else:
                count, kind = most, "all"
            if kind == "middle" and step_rng.random() < 0.5:
                # Half of these batches keep the small vocabularies in, listed as a whole, half do not.
                count = min(count, int(capacities.min()))
            eligible = np.flatnonzero(offers & (self._capacities >= count))
        else:
            count, eligible = 0, np.flatnonzero(offers)
        points = draw_points(step_rng) if task == "segmentation" else 2
        shares = np.cumsum(self._weights[eligible] / self._weights[eligible].sum())

        rngs = [self._rng(SAMPLE_STREAM, step, 0, first + place) for place in range(self.batch_size)]
        chosen = [int(eligible[np.searchsorted(shares[:-1], rng.random(), "right")]) for rng in rngs]
        samples = [self._sample(index, task, count, rng) for index, rng in zip(chosen, rngs, strict=True)]
        count = min([count, *map(_names_known, samples)])
        images, sizes = padded_pictures([sample.image for sample in samples], self.longest_side)
        batch = TrainBatch(
            images=images,
            sizes=sizes,
            boxes=[],
            labels=[],
            instructions=[],
            ignore=[],
            unlisted=[],
            unlisted_names=[],
            source=[self.sources[index].name for index in chosen],
            photo=[self.sources[index].photo for index in chosen],
            task=task,
            points=[] if task in ("segmentation", "keypoints") else None,
            visibility=[] if task == "keypoints" else None,
        )
        if task in ("captioning", "vqa"):
            drawn = self._phrasings
            chosen_formats = step_rng.integers(len(drawn), size=MORE_FORMATS)
            batch.formats = [(drawn[k].text, drawn[k].format) for k in chosen_formats]
        keypoints = draw_keypoints(samples, step_rng) if task == "keypoints" else ()
        for index, sample, rng in zip(chosen, samples, rngs, strict=True):
            if task in ("captioning", "vqa"):
                self._add_words(batch, sample, template, rng)
                continue
            foreign = self.prompts.foreign_names if self.sources[index].photo else 0.0
            if foreign and rng.random() < foreign:
                sample = replace(sample, vocabulary=sample.vocabulary + self._foreign[index])
            if task == "grounding":
                sample, classes = draw_expressions(sample, rng)
            else:
                is_target = ~np.asarray(sample.iscrowd, bool)
                present = [name for name, target in zip(sample.names, is_target, strict=True) if target]
                unclear = [name for name, target in zip(sample.names, is_target, strict=True) if not target]
                if self.prompts.random_classes:
                    classes = draw_class_set(present, unclear, sample.vocabulary, count, rng, self.prompts)
                else:
                    classes = self._vocabularies[index]
            self._add_objects(batch, sample, classes, points, keypoints)
            batch.instructions.append(
                template.instruction(
                    classes,
                    range=draw_range(rng, self.prompts),
                    points=len(keypoints) if task == "keypoints" else points,
                    keypoints=keypoints,
                )
            )
        return batch

    @cached_property
    def _phrasings(self) -> list[FormatPhrasing]:
        return training_phrasings()

    def _draw_task(self, rng: np.random.Generator) -> str:
        if len(self.tasks) == 1:
            return next(iter(self.tasks))
        shares = np.cumsum(list(self.tasks.values()))
        return list(self.tasks)[int(np.searchsorted(shares[:-1] / shares[-1], rng.random(), "right"))]

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=stream))

    def _sample(self, index: int, task: str, count: int, rng: np.random.Generator) -> Sample:
        """A sample of a source that can be asked for the task, with a prompt of about ``count`` names.

        A picture can know fewer names than its source: on a real background, or with a damaged annotation;
        and have nothing to describe.
        """
        sample = self._draw(index, task, rng)
        for _ in range(DRAWS - 1):
            if _names_known(sample) >= 0.95 * count and _says_enough(sample, task):
                break
            sample = self._draw(index, task, rng)
        return sample

    def _draw(self, index: int, task: str, rng: np.random.Generator) -> Sample:
        photos = self._photos[index]
        if photos is not None:
            view = photos.draw(rng)
            if task == "grounding":
                view = replace(view, expressions=derived_expressions(view, rng))
            return view
        dataset = self.sources[index].dataset
        sample = dataset[int(rng.integers(len(dataset)))]
        height, width = view_size(sample, self.image_size, self.longest_side)
        return resize(sample, width, height)

    def _add_objects(
        self,
        batch: TrainBatch,
        sample: Sample,
        classes: Sequence[str],
        points: int,
        keypoints: Sequence[str],
    ) -> None:
        if batch.task == "segmentation":
            # What has no outline is there, but cannot be asked for.
            outlines = sample.outlines or [None] * len(sample.names)
            without = np.array([outline is None for outline in outlines], bool).reshape(-1)
            sample = replace(sample, iscrowd=np.asarray(sample.iscrowd, bool) | without)
        objects = targets_of(sample, classes, self.prompts.max_objects)
        batch.boxes.append(objects.boxes)
        batch.labels.append(objects.labels)
        batch.ignore.append(objects.ignore)
        batch.unlisted.append(objects.unlisted)
        batch.unlisted_names.append(objects.unlisted_names)
        size = np.array(sample.image.shape[1::-1], np.float32)
        if batch.task == "segmentation":
            rows = [resample(outlines[i], points) for i in objects.places]
            assert batch.points is not None
            batch.points.append(_stack(rows, points, 2) / size)
        elif batch.task == "keypoints":
            known = sample.keypoints or [{}] * len(sample.names)
            triples = _stack(
                [[known[i].get(name, (0.0, 0.0, 0)) for name in keypoints] for i in objects.places],
                len(keypoints),
                3,
            )
            assert batch.points is not None and batch.visibility is not None
            batch.points.append(triples[..., :2] / size)
            batch.visibility.append(triples[..., 2].astype(np.int64))

    def _add_words(
        self, batch: TrainBatch, sample: Sample, template: Template, rng: np.random.Generator
    ) -> None:
        questions = [sample.questions[k] for k in rng.permutation(len(sample.questions))]
        if batch.task == "vqa":
            question = questions.pop()
            batch.instructions.append(template.instruction((), question=question.text))
            batch.answers.append(question.answer)
        else:
            if (
                template.length not in sample.captions
            ):  # a length that there is no caption of is not asked for
                fitting = [one for one in self.templates["captioning"] if one.length in sample.captions]
                if not fitting:
                    has = ", ".join(sample.captions) or "none"
                    raise ValueError(f"templates: expected one for captions that are {has}, got none")
                template = fitting[int(rng.integers(len(fitting)))]
            references = sample.captions[template.length]
            batch.instructions.append(template.instruction(()))
            batch.answers.append(references[int(rng.integers(len(references)))])
        turns = [(question.text, question.answer) for question in questions[:MORE_QUESTIONS]]
        others = [length for length in sample.captions if batch.task == "vqa" or length != template.length]
        if others:
            length = others[int(rng.integers(len(others)))]
            references = sample.captions[length]
            caption = CAPTION_TURNS[length], references[int(rng.integers(len(references)))]
            turns.insert(int(rng.integers(len(turns) + 1)), caption)
        batch.turns.append(turns)


def draw_points(rng: np.random.Generator) -> int:
    """How many points of an outline a step asks for, 4 to 64: mostly the paper's numbers."""
    if rng.random() < 0.7:
        return int(rng.choice((8, 14, 16, 16, 20, 24)))
    return round(math.exp(rng.uniform(math.log(4), math.log(64))))


def draw_keypoints(samples: Sequence[Sample], rng: np.random.Generator) -> tuple[str, ...]:
    """Names that a step's prompts ask for, in random order: some of those that one of its objects has."""
    sets = [tuple(points) for sample in samples for points in sample.keypoints or () if points]
    if not sets:
        raise ValueError("keypoints: expected an object with keypoints in the batch, got none")
    names = sets[int(rng.integers(len(sets)))]
    count = min(len(names), int(rng.integers(1, MOST_KEYPOINTS + 1)))
    return tuple(names[i] for i in rng.permutation(len(names))[:count])


def draw_expressions(sample: Sample, rng: np.random.Generator) -> tuple[Sample, tuple[str, ...]]:
    """Some of a picture's expressions in random order, and the sample with them as its objects' names.

    No two of them mean the same object: an object gets one answer.
    """
    wanted = int(rng.integers(1, MOST_EXPRESSIONS + 1))
    names, classes = [""] * len(sample.names), list[str]()
    for i in rng.permutation(len(sample.expressions)):
        expression = sample.expressions[i]
        if expression.text in classes or any(names[k] for k in expression.objects):
            continue
        classes.append(expression.text)
        for k in expression.objects:
            names[k] = expression.text
        if len(classes) == wanted:
            break
    return replace(sample, names=names), tuple(classes)


@dataclass(frozen=True)
class TargetObjects:
    """A sample's objects as a prompt sees them, boxes as in `TrainBatch`.

    Attributes:
        places: int64 ``[n]``, positions of the targets in the sample.
    """

    boxes: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    ignore: np.ndarray
    unlisted: np.ndarray
    unlisted_names: list[str]


def targets_of(sample: Sample, classes: Sequence[str], max_objects: int) -> TargetObjects:
    """Listed objects, areas to ignore and unlisted objects.

    Boxes are clipped to the picture, in centre form, in 0..1 of its width and height, the largest first;
    those beyond ``max_objects`` and crowds are areas to ignore. Boxes without extent are left out.
    """
    number = {name: k for k, name in enumerate(classes)}
    labels = np.array([number.get(name, -1) for name in sample.names], np.int64).reshape(-1)
    height, width = sample.image.shape[:2]
    corners = np.clip(sample.boxes.reshape(-1, 4) / np.array([width, height] * 2, np.float32), 0, 1)
    boxes = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
    boxes = boxes.astype(np.float32)
    has_extent = (boxes[:, 2:] > 0).all(1)
    is_listed = (labels >= 0) & has_extent
    is_crowd = np.asarray(sample.iscrowd, bool).reshape(-1)
    targets = np.flatnonzero(is_listed & ~is_crowd)
    targets = targets[np.argsort(-boxes[targets, 2] * boxes[targets, 3], kind="stable")]
    ignored = np.concatenate([np.flatnonzero(is_listed & is_crowd), targets[max_objects:]])
    unlisted = np.flatnonzero((labels < 0) & has_extent & ~is_crowd)
    found = targets[:max_objects]
    return TargetObjects(
        boxes[found],
        labels[found],
        found,
        boxes[ignored],
        boxes[unlisted],
        [sample.names[i] for i in unlisted],
    )


def _stack(rows: Sequence[Any], *shape: int) -> np.ndarray:
    return np.asarray(rows, np.float32).reshape(len(rows), *shape)


def _says_enough(sample: Sample, task: str) -> bool:
    """Whether the sample has what the task asks for."""
    if task == "vqa":
        return bool(sample.questions)
    if task == "captioning":
        return bool(sample.captions)
    if task == "grounding":
        return bool(sample.expressions)
    if task == "keypoints":
        return any(sample.keypoints or ())
    return True


def _settings(kind: type, given: Any, name: str) -> Any:
    if given is None:
        return kind()
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: expected {kind.__name__} or a mapping, got {type(given).__name__}")
    known = [one.name for one in fields(kind)]
    for key in given:
        if key not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {key!r}")
    return kind(
        **{key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in given.items()}
    )


def _names_known(sample: Sample) -> int:
    """How many names a prompt for the sample can list."""
    return len({*sample.vocabulary, *sample.names})


def vocabulary_of(source: Source) -> tuple[str, ...]:
    """The names that a prompt for this source can list."""
    dataset: Any = source.dataset
    if not set(source.tasks).intersection(CLASS_TASKS):
        return ()
    return getattr(dataset, "vocabulary", None) or getattr(dataset, "names", None) or dataset[0].vocabulary
