"""Samples of any source as evaluation needs them: their objects in COCO form, and what is said about them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from visionllm.data.sample import Sample

KEPT_BYTES = 1 << 29  # of pictures; beyond, they are read a second time from their source


class Samples(Protocol):
    """A data set of samples: `visionllm.data.scenes.SceneDataset` and the loaders of visionllm.data."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class SampleSet:
    """Pictures, categories and ground truth of a data set of samples; a stand-in for `EvaluationSet`.

    Attributes:
        samples: the samples without their pictures, in order.
        images: COCO entries of the pictures. ``id`` is the source's where it is a number and no other picture
            has it, else the position from 1; ``not_exhaustive`` lists the categories that may be in the
            picture without a box.
        names: the K class names: the source's own ``names`` or ``vocabulary``, else those of all samples.
        category_ids: their K ids: those of the source's ``category_names``, else from 1.
        content: the whole in COCO form. Annotations also have ``segmentation`` where the samples have masks,
            and ``named_keypoints`` (name to x, y, v) where they have keypoints.
        frequency: by name "r", "c" or "f", of LVIS alone.
    """

    def __init__(self, source: Samples, limit: int | None = None) -> None:
        """Reads the samples, or the first ``limit`` of them, once.

        Raises:
            ValueError: there are no samples, or one has another class than its source names.
        """
        count = len(source) if limit is None else min(limit, len(source))
        if not count:
            raise ValueError("samples: expected at least one, got none")
        self._source = source
        self.frequency: dict[str, str] | None = getattr(source, "frequency", None)
        self._pictures: dict[int, np.ndarray] = {}
        self.samples: list[Sample] = []
        self.images: list[dict[str, Any]] = []
        kept = 0
        for index in range(count):
            sample = source[index]
            height, width = sample.image.shape[:2]
            if kept + sample.image.nbytes <= KEPT_BYTES:
                self._pictures[index] = sample.image
                kept += sample.image.nbytes
            self.samples.append(replace(sample, image=np.zeros((0, 0, 3), np.uint8)))
            self.images.append({"id": index + 1, "width": width, "height": height})
        ids = [sample.image_id for sample in self.samples]
        if all(isinstance(number, int) for number in ids) and len(set(ids)) == count:
            for image, number in zip(self.images, ids, strict=True):
                image["id"] = number
        self._position = {image["id"]: index for index, image in enumerate(self.images)}
        self.names, self.category_ids = self._categories()
        category = dict(zip(self.names, self.category_ids, strict=True))
        annotations: list[dict[str, Any]] = []
        for image, sample in zip(self.images, self.samples, strict=True):
            listed = set(sample.vocabulary)
            image["not_exhaustive"] = [category[name] for name in self.names if name not in listed]
            for k, name in enumerate(sample.names):
                if name not in category:
                    raise ValueError(
                        f"sample {sample.image_id}: {name!r} is none of its source's {len(category)} names"
                    )
                annotations.append(_annotation(sample, k, image["id"], category[name], len(annotations) + 1))
        categories = [{"id": number, "name": name} for name, number in category.items()]
        self.content = {"images": self.images, "categories": categories, "annotations": annotations}

    def read(self, image: dict[str, Any]) -> np.ndarray:
        """The picture of one of the entries, uint8 RGB ``[H, W, 3]``."""
        index = self._position[image["id"]]
        kept = self._pictures.get(index)
        return self._source[index].image if kept is None else kept

    def objects(self) -> dict[Any, list[dict[str, Any]]]:
        """The annotations of each picture, by image id; every picture has a list."""
        from visionllm.evaluate.dataset import by_image

        return by_image(self.images, self.content["annotations"])

    def _categories(self) -> tuple[list[str], list[int]]:
        """Names and ids."""
        numbered: dict[int, str] = getattr(self._source, "category_names", {})
        if numbered:
            return list(numbered.values()), list(numbered)
        given = getattr(self._source, "names", ()) or getattr(self._source, "vocabulary", ())
        names = list(given) or list(
            dict.fromkeys(name for one in self.samples for name in (*one.vocabulary, *one.names))
        )
        return names, list(range(1, len(names) + 1))


def _annotation(sample: Sample, k: int, image_id: int, category_id: int, number: int) -> dict[str, Any]:
    """Object k in COCO form."""
    x1, y1, x2, y2 = (float(value) for value in sample.boxes[k])
    entry: dict[str, Any] = {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": float(sample.area[k]),
        "iscrowd": int(sample.iscrowd[k]),
    }
    if sample.masks is not None and sample.masks[k]:
        entry["segmentation"] = sample.masks[k]
    if sample.keypoints is not None:
        entry["named_keypoints"] = sample.keypoints[k]
    return entry
