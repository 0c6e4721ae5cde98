"""Training batches from several data sets, with random prompts: a pure function of (seed, step, rank).

Nothing depends on which batches were made before, so that a run resumes anywhere and processes share no
state. The number of listed names and the template are the same for all samples of a step, on all ranks:
nothing is padded for want of names, and no rank waits for another's longer prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from visionllm.data.class_set import PromptSettings, draw_class_set, draw_count, draw_range
from visionllm.data.photo_augmentation import AugmentedPhotos, PhotoAugmentation, SampleSource, resize
from visionllm.data.sample import Sample
from visionllm.instruction import TRAIN_TEMPLATES, Instruction, Template
from visionllm.instruction.instruction import MAX_CLASSES

STEP_STREAM, SAMPLE_STREAM = 0, 1  # independent random streams
DRAWS = 8  # attempts to find a picture that knows enough names for a long prompt


@dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    Attributes:
        dataset: samples by index.
        weight: share of the samples, relative to the other sources.
        photo: a finite set of photos, drawn with augmentation; otherwise pictures are taken as they are.
        name: for logs.
    """

    dataset: SampleSource
    weight: float = 1.0
    photo: bool = False
    name: str = ""


@dataclass
class TrainBatch:
    """B pictures with their instructions and targets; all instructions list the same number of names.

    Attributes:
        images: uint8 RGB ``[B, S, S, 3]``.
        boxes: B arrays float32 ``[n, 4]``, centre x, centre y, width, height in 0..1 of the picture: the
            objects whose class is listed.
        labels: B arrays int64 ``[n]``, positions in ``instruction.classes``.
        instructions: B instructions with their text.
        ignore: B arrays float32 ``[m, 4]`` like ``boxes``: areas with objects of listed classes that are no
            targets (crowds, objects cut off by the border, more objects than asked for); answers there are
            neither right nor wrong.
        unlisted: B arrays float32 ``[m, 4]`` like ``boxes``: objects whose class is not listed; nothing must
            be said there.
        unlisted_names: the m names of those.
        source: the B names of the sources.
        photo: B times whether it is a photo source.
    """

    images: np.ndarray
    boxes: list[np.ndarray]
    labels: list[np.ndarray]
    instructions: list[Instruction]
    ignore: list[np.ndarray]
    unlisted: list[np.ndarray]
    unlisted_names: list[list[str]]
    source: list[str]
    photo: list[bool]


class TrainingBatches:
    """``batches[step]`` is rank ``rank``'s `TrainBatch` of that step.

    Args:
        sources: the data sets with their weights.
        seed: of everything drawn.
        batch_size: pictures per rank and step.
        image_size: side S in pixels.
        rank, world_size: which of how many processes this is.
        prompts: how prompts are drawn; a mapping changes single fields of the default.
        augmentation: of photos; a mapping likewise.
        templates: instruction templates; the detection ones for training by default.
        cache_bytes: memory for decoded photos, per source.

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
        prompts: PromptSettings | Mapping[str, Any] | None = None,
        augmentation: PhotoAugmentation | Mapping[str, Any] | None = None,
        templates: Sequence[Template] | None = None,
        cache_bytes: int = 1 << 30,
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
        self.rank, self.world_size = rank, world_size
        self.prompts = _settings(PromptSettings, prompts, "prompts")
        self.augmentation = _settings(PhotoAugmentation, augmentation, "augmentation")
        self.templates = list(TRAIN_TEMPLATES["detection"] if templates is None else templates)
        if not self.templates:
            raise ValueError("templates: expected at least one, got none")
        self._photos = [
            AugmentedPhotos(source.dataset, image_size, self.augmentation, cache_bytes)
            if source.photo
            else None
            for source in self.sources
        ]
        self._weights = weights[weights > 0]
        vocabularies = [_vocabulary(source) for source in self.sources]
        everything = dict.fromkeys(name for names in vocabularies for name in names)
        self._foreign = [
            tuple(name for name in everything if name not in own) for own in map(frozenset, vocabularies)
        ]
        self._capacities = np.array([len(set(names)) for names in vocabularies])

    def __iter__(self) -> Iterator[TrainBatch]:
        """All steps from 0 on, without end."""
        step = 0
        while True:
            yield self[step]
            step += 1

    def __getitem__(self, step: int) -> TrainBatch:
        if step < 0:
            raise IndexError(f"step: expected at least 0, got {step}")
        step_rng = self._rng(STEP_STREAM, step)
        template = self.templates[step_rng.integers(len(self.templates))]
        count, kind = draw_count(step_rng, min(int(self._capacities.max()), MAX_CLASSES), self.prompts)
        if kind == "middle" and step_rng.random() < 0.5:
            # Half of these batches keep the small vocabularies in, listed as a whole, half leave them out.
            count = min(count, int(self._capacities.min()))
        eligible = np.flatnonzero(self._capacities >= count)
        shares = np.cumsum(self._weights[eligible] / self._weights[eligible].sum())

        rngs = [self._rng(SAMPLE_STREAM, step, self.rank, position) for position in range(self.batch_size)]
        chosen = [int(eligible[np.searchsorted(shares[:-1], rng.random(), "right")]) for rng in rngs]
        samples = [self._sample(index, count, rng) for index, rng in zip(chosen, rngs, strict=True)]
        count = min([count, *map(_names_known, samples)])
        batch = TrainBatch(
            images=np.stack([sample.image for sample in samples]),
            boxes=[],
            labels=[],
            instructions=[],
            ignore=[],
            unlisted=[],
            unlisted_names=[],
            source=[self.sources[index].name for index in chosen],
            photo=[self.sources[index].photo for index in chosen],
        )
        for index, sample, rng in zip(chosen, samples, rngs, strict=True):
            foreign = self.prompts.foreign_names if self.sources[index].photo else 0.0
            if foreign and rng.random() < foreign:
                sample = replace(sample, vocabulary=sample.vocabulary + self._foreign[index])
            self._add_prompt(batch, sample, count, template, rng)
        return batch

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=stream))

    def _sample(self, index: int, count: int, rng: np.random.Generator) -> Sample:
        """A sample of a source, one that can fill a prompt of about ``count`` names if a few draws find any.

        A picture can know fewer names than its source: on a real background, or with a damaged annotation.
        """
        sample = self._draw(index, rng)
        for _ in range(DRAWS - 1):
            if _names_known(sample) >= 0.95 * count:
                break
            sample = self._draw(index, rng)
        return sample

    def _draw(self, index: int, rng: np.random.Generator) -> Sample:
        photos = self._photos[index]
        if photos is not None:
            return photos.draw(rng)
        dataset = self.sources[index].dataset
        return resize(dataset[int(rng.integers(len(dataset)))], self.image_size, self.image_size)

    def _add_prompt(
        self,
        batch: TrainBatch,
        sample: Sample,
        count: int,
        template: Template,
        rng: np.random.Generator,
    ) -> None:
        is_target = ~np.asarray(sample.iscrowd, bool)
        present = [name for name, target in zip(sample.names, is_target, strict=True) if target]
        unclear = [name for name, target in zip(sample.names, is_target, strict=True) if not target]
        classes = draw_class_set(present, unclear, sample.vocabulary, count, rng, self.prompts)
        boxes, labels, ignore, unlisted, unlisted_names = targets_of(
            sample, classes, self.prompts.max_objects
        )
        batch.boxes.append(boxes)
        batch.labels.append(labels)
        batch.ignore.append(ignore)
        batch.unlisted.append(unlisted)
        batch.unlisted_names.append(unlisted_names)
        batch.instructions.append(template.instruction(classes, range=draw_range(rng, self.prompts)))


def targets_of(
    sample: Sample, classes: Sequence[str], max_objects: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Listed objects' boxes ``[n, 4]`` and labels ``[n]``; areas to ignore; unlisted objects and their names.

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
    return boxes[found], labels[found], boxes[ignored], boxes[unlisted], [sample.names[i] for i in unlisted]


def _settings(kind: type, given: Any, name: str) -> Any:
    if given is None:
        return kind()
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: expected {kind.__name__} or a mapping, got {type(given).__name__}")
    known = [field.name for field in fields(kind)]
    for key in given:
        if key not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {key!r}")
    return kind(
        **{key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in given.items()}
    )


def _names_known(sample: Sample) -> int:
    """How many names a prompt for the sample can list."""
    return len({*sample.vocabulary, *sample.names})


def _vocabulary(source: Source) -> tuple[str, ...]:
    """The names that a prompt for this source can list."""
    dataset = source.dataset
    return getattr(dataset, "vocabulary", None) or getattr(dataset, "names", None) or dataset[0].vocabulary
