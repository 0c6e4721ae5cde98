"""LVIS: COCO's photos with over a thousand kinds of objects (Gupta et al. 2019, arXiv:1908.03195).

The format is COCO's, with two differences. A picture names its file in ``coco_url`` (v1; v0.5 has
``file_name`` too). And not every kind was looked for in every picture: known are the kinds with annotations,
except those in ``not_exhaustive_category_ids`` (some of their objects lack a box), and the kinds in
``neg_category_ids`` (none of them is there). Of all others a picture says nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visionllm.data.coco import CocoDataset
from visionllm.data.coco_pictures import find_pictures
from visionllm.data.report import Problem, Report, described, is_id
from visionllm.data.validate import read_coco_json, validate_content

NEGATIVE, NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"


class LvisDataset(CocoDataset):
    """Pictures with their objects, whose vocabularies are what is known of each picture.

    Objects of a kind that is not exhaustively annotated have their boxes in the samples, but their names are
    not in ``Sample.vocabulary``. Names are written as in a sentence: ``arctic_(type_of_shoe)`` is
    "arctic (type of shoe)".

    Args:
        annotations: ``lvis_v1_train.json``, ``lvis_v1_val.json`` or v0.5's.
        images: folder of COCO's pictures (see `visionllm.data.coco_pictures`).
        on_error, check_images, shown, outlines, captions, keypoints: as for `CocoDataset`.

    Attributes:
        frequency: by name "r", "c" or "f" for rare, common and frequent kinds, where the file says it.

    Raises:
        DatasetError, ValueError: as `CocoDataset`.
    """

    frequency: dict[str, str]

    def image_vocabulary(self, index: int) -> tuple[str, ...]:
        """The names of which this picture has all objects annotated, or of which there is none."""
        known = {entry["category_id"] for entry in self.objects[index]}
        known.update(self.images[index].get(NEGATIVE, ()))
        names = {self.category_names[number] for number in known if number in self.category_names}
        names -= self._unknown.get(index, set())
        return tuple(name for name in self.vocabulary if name in names)

    def _read(self) -> dict[str, Any]:
        return read_lvis_json(self.annotations, self.folder)

    def _check_more(self, content: dict[str, Any]) -> None:
        check_known(content, self.annotations, self.report)
        usable = [content["categories"][index] for index in self.report.categories]
        self.frequency = {
            category["name"]: category["frequency"]
            for category in usable
            if category.get("frequency") in ("r", "c", "f")
        }


def validate_lvis(annotations: str | Path, images: str | Path | None, check_images: str = "decode") -> Report:
    """As `visionllm.data.validate.validate_coco`, for LVIS."""
    content = read_lvis_json(annotations, images)
    report = validate_content(content, annotations, images, check_images)
    check_known(content, annotations, report)
    return report


def read_lvis_json(annotations: str | Path, images: str | Path | None) -> dict[str, Any]:
    """An LVIS file as a COCO file would say it. Raises `DatasetError` for a file that is no such thing.

    Pictures have ``file_name``, where the photo is found if ``images`` is given, and ``not_exhaustive``;
    categories have readable names.
    """
    content = read_coco_json(annotations)
    content = {
        **content,
        "images": [_image(entry) for entry in content["images"]],
        "categories": _categories(content["categories"]),
    }
    return content if images is None else find_pictures(content, images)


def check_known(content: dict[str, Any], annotations: str | Path, report: Report) -> None:
    """Adds to the report what is wrong with the lists of kinds that are known of the pictures."""
    categories = {content["categories"][index]["id"] for index in report.categories}
    present: dict[Any, set[int]] = {}
    for index in report.annotations:
        entry = content["annotations"][index]
        present.setdefault(entry["image_id"], set()).add(entry["category_id"])
    wrong = set()
    for index in report.images:
        image = content["images"][index]
        for key in (NEGATIVE, NOT_EXHAUSTIVE):
            message = _ids_problem(image.get(key, []), categories)
            shown = present.get(image["id"], set()).intersection(image.get(key, ())) if not message else set()
            if key == NEGATIVE and shown:
                message = (
                    f"expected kinds that are not in the picture, got {min(shown)}, which has a box there"
                )
            if message:
                report.problems.append(Problem(str(annotations), "images", index, key, message))
                wrong.add(index)
    report.usable["images"] = [index for index in report.images if index not in wrong]


def _ids_problem(ids: Any, categories: set[Any]) -> str | None:
    if not isinstance(ids, list) or not all(is_id(number, (int,)) for number in ids):
        return f"expected a list of category ids, got {described(ids)}"
    unknown = [number for number in ids if number not in categories]
    return f"unknown category {unknown[0]}" if unknown else None


def _image(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    image = dict(entry)
    url = image.get("coco_url")
    if "file_name" not in image and isinstance(url, str):
        image["file_name"] = "/".join(url.split("/")[-2:])  # http://…/train2017/000000391895.jpg
    unsure = image.get(NOT_EXHAUSTIVE)
    if isinstance(unsure, list) and all(is_id(number, (int,)) for number in unsure):
        image["not_exhaustive"] = unsure
    return image


def _categories(entries: list[Any]) -> list[Any]:
    """The categories with readable names, unless two would then have the same."""
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    readable = [name.replace("_", " ") if isinstance(name, str) else None for name in names]
    if len(set(readable)) < len({name if isinstance(name, str) else None for name in names}):
        return entries
    return [
        {**entry, "name": name} if isinstance(name, str) else entry
        for entry, name in zip(entries, readable, strict=True)
    ]
