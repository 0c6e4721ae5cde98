"""COCO-format data sets from a folder of pictures and one JSON file (https://cocodataset.org/#format-data)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionllm.data.coco_captions import read_captions
from visionllm.data.coco_keypoints import Points, keypoint_names, points_by_annotation
from visionllm.data.polygons import outline_of
from visionllm.data.report import Report
from visionllm.data.sample import Sample
from visionllm.data.validate import read_coco_json, validate_content
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
        outlines: give every object the outline of its segmentation's largest part; crowds have none.
        captions: COCO's JSON file of captions for pictures of this set; those for others are ignored.
        keypoints: COCO's JSON file of keypoints for objects of this set, told by their annotations' ids.
            Keypoints in the annotation file itself need no such file.

    Attributes:
        keypoint_names: the points' names by category name, for the categories that have points.

    Raises:
        DatasetError: something is wrong and ``on_error`` is "fail", or a JSON file cannot be used at all.
        ValueError: an argument is none of the allowed ones.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        on_error: str = "fail",
        check_images: str = "decode",
        shown: int = 20,
        outlines: bool = False,
        captions: str | Path | None = None,
        keypoints: str | Path | None = None,
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise ValueError(f"on_error: expected fail or skip, got {on_error!r}")
        self.annotations = Path(annotations)
        self.folder = Path(images)
        self.outlines = outlines
        content = self._read()
        wanted = self._wanted_images()
        self.report: Report = validate_content(content, annotations, images, check_images, wanted=wanted)
        self.keypoint_names: dict[str, tuple[str, ...]] = keypoint_names(content, self.report)
        self._points: dict[Any, Points] = points_by_annotation(content, self.report)
        if keypoints is not None:
            points_content = read_coco_json(keypoints)
            points_report = validate_content(points_content, keypoints, None)
            self.keypoint_names |= keypoint_names(points_content, points_report)
            self._points |= points_by_annotation(points_content, points_report)
            self.report.add(points_report, "keypoint")
        self._captions: dict[Any, list[str]] = {}
        if captions is not None:
            self._captions, captions_report = read_captions(captions)
            self.report.add(captions_report, "caption")
        self._check_more(content)
        if on_error == "fail":
            self.report.raise_if_any(shown)

        usable = [content["categories"][index] for index in self.report.categories]
        self.category_names: dict[int, str] = {category["id"]: category["name"] for category in usable}
        self.vocabulary: tuple[str, ...] = tuple(category["name"] for category in usable)
        entries = [content["images"][index] for index in self.report.images]
        self.images: list[dict[str, Any]] = [
            entry for entry in entries if wanted is None or entry["id"] in wanted
        ]
        self.objects: list[list[dict[str, Any]]] = [[] for _ in self.images]  # annotation entries by picture
        position = {image["id"]: i for i, image in enumerate(self.images)}
        for index in self.report.annotations:
            entry = content["annotations"][index]
            if entry["image_id"] in position:
                self.objects[position[entry["image_id"]]].append(entry)
        self._unknown: dict[int, set[str]] = {}  # by picture: names that it may show without a box
        for i, image in enumerate(self.images):
            unsure = {self.category_names.get(number, "") for number in image.get("not_exhaustive", ())}
            if unsure:
                self._unknown[i] = unsure
        if not self.report.ok:
            self._find_lost_objects(content["annotations"], position)

    def _read(self) -> dict[str, Any]:
        """The annotation file's content, for data sets that write it in a way of their own to change it."""
        return read_coco_json(self.annotations)

    def _check_more(self, content: dict[str, Any]) -> None:
        """For data sets with files of their own: adds what is wrong with those to the report."""

    def _wanted_images(self) -> Collection[Any] | None:
        """Ids of the pictures to use; None: all of them."""
        return None

    @property
    def has_captions(self) -> bool:
        """Whether some picture has captions."""
        return bool(self._captions)

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
        if index not in self._unknown:
            return self.vocabulary
        return tuple(name for name in self.vocabulary if name not in self._unknown[index])

    def __getitem__(self, index: int) -> Sample:
        """The picture with its objects in file order; boxes, outlines and points are clipped to it.

        Raises:
            IndexError: no such picture.
            ImageError: the picture's file broke since the data set was opened, or was not checked.
        """
        image, objects = self.images[index], self.objects[index]
        width, height = int(image["width"]), int(image["height"])
        pixels = open_annotated(self.image_path(index), (width, height))
        boxes = np.clip(box_corners(objects), 0, np.array([width, height, width, height]))
        has_masks = any(entry.get("segmentation") for entry in objects)
        captions = self._captions.get(image["id"])
        return Sample(
            image=pixels,
            boxes=boxes.astype(np.float32),
            names=[self.category_names[entry["category_id"]] for entry in objects],
            area=np.array([entry["area"] for entry in objects], np.float32).reshape(-1),
            iscrowd=np.array([bool(entry.get("iscrowd", 0)) for entry in objects], bool).reshape(-1),
            image_id=image["id"],
            vocabulary=self.image_vocabulary(index),
            masks=[entry.get("segmentation") for entry in objects] if has_masks else None,
            outlines=[outline for outline, _ in self._outlines(index)] if self.outlines else None,
            keypoints=self._keypoints(index) if self.keypoint_names else None,
            captions={"short": list(captions)} if captions else {},
        )

    def lost_area(self) -> tuple[float, float]:
        """What outlines leave out: area in square pixels in objects' smaller parts, and that of all parts.

        Crowds and objects without a segmentation are not counted.
        """
        lost = total = 0.0
        for index, objects in enumerate(self.objects):
            for entry, (outline, share) in zip(objects, self._outlines(index), strict=True):
                if outline is not None:
                    lost += share * entry["area"]
                    total += entry["area"]
        return lost, total

    def _outlines(self, index: int) -> list[tuple[np.ndarray | None, float]]:
        """Outline float32 ``[P, 2]`` and share of area outside it, by object."""
        image = self.images[index]
        width, height = int(image["width"]), int(image["height"])
        found: list[tuple[np.ndarray | None, float]] = []
        for entry in self.objects[index]:
            outline, lost = None, 1.0
            if entry.get("segmentation") and not entry.get("iscrowd", 0):
                outline, lost = outline_of(entry["segmentation"], height, width)
            if outline is not None:
                outline = np.clip(outline, 0, np.array([width, height], np.float32))
            found.append((outline, lost))
        return found

    def _keypoints(self, index: int) -> list[Points]:
        image = self.images[index]
        width, height = float(image["width"]), float(image["height"])
        return [
            {
                name: (min(max(x, 0.0), width), min(max(y, 0.0), height), flag)
                for name, (x, y, flag) in self._points.get(entry["id"], {}).items()
            }
            for entry in self.objects[index]
        ]

    def _find_lost_objects(self, entries: list[Any], position: dict[Any, int]) -> None:
        usable = set(self.report.annotations)
        for index, entry in enumerate(entries):
            if index in usable or not isinstance(entry, dict):
                continue
            image_id, category_id = entry.get("image_id"), entry.get("category_id")
            if not isinstance(image_id, (int, str)) or not isinstance(category_id, int):
                continue
            if image_id in position and category_id in self.category_names:
                self._unknown.setdefault(position[image_id], set()).add(self.category_names[category_id])


def box_corners(entries: Sequence[dict[str, Any]]) -> np.ndarray:
    """The boxes of annotations or results, x, y, width, height, as corners: float64 xyxy ``[n, 4]``."""
    boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
