"""COCO-format data sets from a folder of pictures and one JSON file (https://cocodataset.org/#format-data)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionllm.data.sample import Sample
from visionllm.data.validate import Report, read_coco_json, validate_content
from visionllm.image import open_annotated


class CocoDataset:
    """Pictures with their objects, read from a COCO-format data set.

    Args:
        annotations: the JSON file.
        images: the folder that its ``file_name`` entries are relative to.
        on_error: "fail" raises a `DatasetError` that lists what is wrong; "skip" leaves out every wrong
            entry, and ``report`` and ``skipped`` say which and how many. A name is not in the vocabulary of a
            picture that lost an object of it: the object is there, without its box.
        check_images: how far each picture is read beforehand ("decode", "header", "none"): see
            `validate_coco`.
        shown: how many problems the error lists.

    Raises:
        DatasetError: something is wrong and ``on_error`` is "fail", or the JSON cannot be used at all.
        ValueError: an argument is none of the allowed ones.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        on_error: str = "fail",
        check_images: str = "decode",
        shown: int = 20,
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise ValueError(f"on_error: expected fail or skip, got {on_error!r}")
        self.annotations = Path(annotations)
        self.folder = Path(images)
        content = read_coco_json(annotations)
        self.report: Report = validate_content(content, annotations, images, check_images)
        if on_error == "fail":
            self.report.raise_if_any(shown)

        usable = [content["categories"][index] for index in self.report.categories]
        self.category_names: dict[int, str] = {category["id"]: category["name"] for category in usable}
        self.vocabulary: tuple[str, ...] = tuple(category["name"] for category in usable)
        self.images: list[dict[str, Any]] = [content["images"][index] for index in self.report.images]
        self.objects: list[list[dict[str, Any]]] = [[] for _ in self.images]  # annotation entries by picture
        position = {image["id"]: i for i, image in enumerate(self.images)}
        for index in self.report.annotations:
            entry = content["annotations"][index]
            self.objects[position[entry["image_id"]]].append(entry)
        self._vocabularies: dict[int, tuple[str, ...]] = {}
        if not self.report.ok:
            self._narrow_vocabularies(content["annotations"], position)

    @property
    def skipped(self) -> dict[str, int]:
        """How many images, categories and annotations were left out."""
        return self.report.skipped

    def __len__(self) -> int:
        return len(self.images)

    def image_path(self, index: int) -> Path:
        return self.folder / self.images[index]["file_name"]

    def image_vocabulary(self, index: int) -> tuple[str, ...]:
        """The names whose objects in this picture all have their boxes."""
        return self._vocabularies.get(index, self.vocabulary)

    def __getitem__(self, index: int) -> Sample:
        """The picture with its objects in file order; boxes are clipped to it.

        Raises:
            IndexError: no such picture.
            ImageError: the picture's file broke since the data set was opened, or was not checked.
        """
        image, objects = self.images[index], self.objects[index]
        width, height = int(image["width"]), int(image["height"])
        pixels = open_annotated(self.image_path(index), (width, height))
        boxes = np.clip(box_corners(objects), 0, np.array([width, height, width, height]))
        has_masks = any(entry.get("segmentation") for entry in objects)
        return Sample(
            image=pixels,
            boxes=boxes.astype(np.float32),
            names=[self.category_names[entry["category_id"]] for entry in objects],
            area=np.array([entry["area"] for entry in objects], np.float32).reshape(-1),
            iscrowd=np.array([bool(entry.get("iscrowd", 0)) for entry in objects], bool).reshape(-1),
            image_id=image["id"],
            vocabulary=self.image_vocabulary(index),
            masks=[entry.get("segmentation") for entry in objects] if has_masks else None,
        )

    def _narrow_vocabularies(self, entries: list[Any], position: dict[Any, int]) -> None:
        lost: dict[int, set[str]] = {}
        usable = set(self.report.annotations)
        for index, entry in enumerate(entries):
            if index in usable or not isinstance(entry, dict):
                continue
            image_id, category_id = entry.get("image_id"), entry.get("category_id")
            if not isinstance(image_id, (int, str)) or not isinstance(category_id, int):
                continue
            if image_id in position and category_id in self.category_names:
                lost.setdefault(position[image_id], set()).add(self.category_names[category_id])
        for index, names in lost.items():
            self._vocabularies[index] = tuple(name for name in self.vocabulary if name not in names)


def box_corners(entries: Sequence[dict[str, Any]]) -> np.ndarray:
    """The boxes of annotations or results, x, y, width, height, as corners: float64 xyxy ``[n, 4]``."""
    boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
