"""A COCO-format data set as evaluation needs it: any boxes, as long as entries refer to each other rightly.

Training is stricter (`visionllm.data.validate`): there a wrong box does harm, here it is part of the set.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from visionllm.image import ImageError, open_image

REQUIRED_FIELDS = {
    "images": ("id", "file_name"),
    "categories": ("id", "name"),
    "annotations": ("image_id", "category_id", "bbox"),
}


class EvaluationSet:
    """Pictures, categories and ground truth.

    Attributes:
        content: the parsed file, every annotation with ``area`` and ``iscrowd``.
        images: the pictures' entries, as many as are to be used.
        folder: what ``file_name`` is relative to.
        names: the K category names, in file order.
        category_ids: their K ids.
    """

    def __init__(self, annotations: str | Path, images: str | Path, limit: int | None = None) -> None:
        """Reads and checks the file and that all the pictures are there.

        Raises:
            ValueError: names the file, list, index and field of what is wrong.
            ImageError: pictures are missing; names the first ones.
        """
        self.folder = Path(images)
        content = read_annotations(Path(annotations))
        self.images: list[dict[str, Any]] = content["images"][:limit]
        self.names = [category["name"] for category in content["categories"]]
        self.category_ids = [category["id"] for category in content["categories"]]
        used = {image["id"] for image in self.images}
        kept = []
        for annotation in content["annotations"]:
            if annotation["image_id"] in used:
                width, height = annotation["bbox"][2:]
                kept.append(
                    {
                        **annotation,
                        "area": annotation.get("area", width * height),
                        "iscrowd": annotation.get("iscrowd", 0),
                    }
                )
        self.content = {**content, "images": self.images, "annotations": kept}
        missing = [path for path in map(self.path, self.images) if not path.is_file()]
        if missing:
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            counts = f"{len(missing)} of {len(self.images)}"
            raise ImageError(f"{annotations}: {counts} pictures are missing: {shown}")

    def path(self, image: dict[str, Any]) -> Path:
        return self.folder / image["file_name"]

    def read(self, image: dict[str, Any]) -> np.ndarray:
        """The picture as the annotations see it, uint8 RGB ``[H, W, 3]``.

        COCO's boxes count stored pixels and ignore the EXIF orientation, other tools' boxes count upright
        ones: the annotated size tells which.

        Raises:
            ImageError: the file is broken or of another size.
        """
        path = self.path(image)
        expected = (image.get("height"), image.get("width"))
        pixels = open_image(path, upright=None in expected)
        if None not in expected and pixels.shape[:2] != expected:
            pixels = open_image(path)
            if pixels.shape[:2] != expected:
                raise ImageError(
                    f"{path}: expected {expected[1]}x{expected[0]} pixels as annotated, "
                    f"got {pixels.shape[1]}x{pixels.shape[0]}"
                )
        return pixels

    def objects(self) -> dict[Any, list[dict[str, Any]]]:
        """The annotations of each picture, by image id; every picture has a list."""
        grouped: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in self.images}
        for annotation in self.content["annotations"]:
            grouped[annotation["image_id"]].append(annotation)
        return grouped


def read_annotations(path: Path) -> dict[str, Any]:
    """The parsed file, its references checked.

    Raises:
        ValueError: names the file, list, index and field of the first thing wrong.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such annotation file") from error
    except ValueError as error:  # JSON or UTF-8
        raise ValueError(f"{path}: expected a COCO annotation file in JSON: {error}") from error
    for section, fields in REQUIRED_FIELDS.items():
        entries = content.get(section) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path}: expected a list {section!r} of COCO's format, found none")
        for index, entry in enumerate(entries):
            for field in fields:
                if not isinstance(entry, dict) or field not in entry:
                    raise ValueError(f"{path}: {section}[{index}].{field}: missing")
    for section in ("images", "categories"):
        seen: set[Any] = set()
        for index, entry in enumerate(content[section]):
            if entry["id"] in seen:
                raise ValueError(f"{path}: {section}[{index}].id: duplicate {entry['id']!r}")
            seen.add(entry["id"])
    if not content["categories"]:
        raise ValueError(f"{path}: categories: expected at least one, got none")
    known = {section: {entry["id"] for entry in content[section]} for section in ("images", "categories")}
    for index, entry in enumerate(content["annotations"]):
        for field, section in (("image_id", "images"), ("category_id", "categories")):
            if entry[field] not in known[section]:
                raise ValueError(
                    f"{path}: annotations[{index}].{field}: expected an id of {section}, got {entry[field]!r}"
                )
        box = entry["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
            raise ValueError(
                f"{path}: annotations[{index}].bbox: expected [x, y, width, height], got {box!r}"
            )
    return content
