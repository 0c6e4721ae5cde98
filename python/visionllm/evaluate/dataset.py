"""A COCO-format data set as evaluation needs it, checked by the rules of `visionllm.data.validate` for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionllm.data.validate import DatasetError, Problem, read_coco_json, validate_content
from visionllm.image import ImageError, open_annotated


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
            DatasetError: names the file, list, index and field of what is wrong.
            ImageError: pictures are missing; names the first ones.
        """
        self.folder = Path(images)
        content = read_coco_json(annotations)
        for section in ("images", "categories"):
            if not content[section]:
                message = "expected at least one, got none"
                raise DatasetError([Problem(str(annotations), section, None, None, message)])
        validate_content(content, annotations, None, purpose="evaluation").raise_if_any()
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

        Raises:
            ImageError: the file is broken or of another size; see `open_annotated`.
        """
        size = (image["width"], image["height"]) if "width" in image and "height" in image else None
        return open_annotated(self.path(image), size)

    def objects(self) -> dict[Any, list[dict[str, Any]]]:
        """The annotations of each picture, by image id; every picture has a list."""
        return by_image(self.images, self.content["annotations"])


def by_image(
    images: Sequence[dict[str, Any]], annotations: Sequence[dict[str, Any]]
) -> dict[Any, list[dict[str, Any]]]:
    """The annotations of each of the pictures, by image id; every picture has a list."""
    grouped: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    for annotation in annotations:
        grouped[annotation["image_id"]].append(annotation)
    return grouped
