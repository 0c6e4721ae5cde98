"""What is wrong with a COCO-format data set: every problem by file, index and field.

A COCO annotation file is one JSON object with three lists::

    images       id, file_name, width, height
    categories   id, name
    annotations  id, image_id, category_id, bbox [x, y, width, height] in pixels, area,
                 optional iscrowd, segmentation

Every entry is checked once (linear time), and an entry that refers to a wrong one is wrong too. A box may
leave its picture by ``BORDER_TOLERANCE`` pixels.

That is what training needs, where a wrong box does harm. Evaluation takes a set as it is: boxes may leave
their picture or be empty; sizes, areas and the ids of annotations may be missing; no mask is looked at.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from visionllm.image import MAX_PIXELS

BORDER_TOLERANCE = 1.0  # pixels; what rounding, or counting pixels from 1, makes of a box at the border
PURPOSES = ("training", "evaluation")
IMAGE_CHECKS = ("decode", "header", "none")
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Problem:
    """One wrong thing. ``section`` and ``index`` are None where the file as a whole is wrong."""

    file: str
    section: str | None  # "images", "categories" or "annotations"
    index: int | None  # position in that list
    field: str | None  # the entry's field, None for the whole entry
    message: str  # what was expected and what came

    def __str__(self) -> str:
        place = self.section or ""
        if self.index is not None:
            place += f"[{self.index}]"
        if self.field is not None:
            place += f".{self.field}" if place else self.field
        return f"{self.file}: {place}: {self.message}" if place else f"{self.file}: {self.message}"


class DatasetError(ValueError):
    """A data set that cannot be used as it is; ``problems`` holds all of them, the text the first ones."""

    def __init__(self, problems: list[Problem], shown: int = 20) -> None:
        self.problems = problems
        lines = [f"{len(problems)} problems in the data set:", *(f"  {one}" for one in problems[:shown])]
        if len(problems) > shown:
            lines.append(f"  ... and {len(problems) - shown} more")
        super().__init__(str(problems[0]) if len(problems) == 1 else "\n".join(lines))


@dataclass
class Report:
    """The outcome of a validation.

    Attributes:
        problems: everything wrong, in file order within images, categories, annotations.
        images, categories, annotations: positions in the file's lists of the entries without any problem.
        totals: how many entries each list has, right or wrong.
    """

    problems: list[Problem] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    categories: list[int] = field(default_factory=list)
    annotations: list[int] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def skipped(self) -> dict[str, int]:
        """How many entries of each list are unusable."""
        return {section: total - len(getattr(self, section)) for section, total in self.totals.items()}

    def raise_if_any(self, shown: int = 20) -> None:
        """Raise `DatasetError` with the first ``shown`` problems and the count, if there is a problem."""
        if self.problems:
            raise DatasetError(self.problems, shown)

    def __str__(self) -> str:
        counts = ", ".join(
            f"{len(getattr(self, section))} of {total} {section}" for section, total in self.totals.items()
        )
        return f"{len(self.problems)} problems; usable: {counts}"


def validate_coco(annotations: str | Path, images: str | Path | None, check_images: str = "decode") -> Report:
    """Check a COCO-format data set and name everything wrong with it.

    Args:
        annotations: the JSON file.
        images: the folder that ``file_name`` is relative to; None checks the JSON only.
        check_images: "decode" reads every picture to its end (finds truncated files), "header" only its size,
            "none" only that the file exists.

    Raises:
        DatasetError: the file is missing, is no JSON, or lacks one of the three lists: nothing could be
            checked.
        ValueError: ``check_images`` is none of the three.
    """
    return validate_content(read_coco_json(annotations), annotations, images, check_images)


def read_coco_json(annotations: str | Path) -> dict[str, Any]:
    """The parsed annotation file, with its three lists present. Raises `DatasetError` otherwise."""
    name = str(annotations)

    def wrong(message: str, section: str | None = None) -> DatasetError:
        return DatasetError([Problem(name, section, None, None, message)])

    try:
        with open(annotations, "rb") as stream:
            content = json.loads(stream.read())
    except FileNotFoundError:
        raise wrong("expected an annotation file, found nothing there") from None
    except OSError as error:
        raise wrong(f"cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise wrong(f"expected JSON: {error}") from error
    except RecursionError as error:
        raise wrong("expected a COCO annotation file, got JSON nested too deeply") from error
    if not isinstance(content, dict):
        raise wrong(f"expected an object with images, annotations and categories, got {_described(content)}")
    for section in ("images", "categories", "annotations"):
        if section not in content:
            raise wrong("missing", section)
        if not isinstance(content[section], list):
            raise wrong(f"expected a list, got {_described(content[section])}", section)
    return content


def validate_content(
    content: dict[str, Any],
    annotations: str | Path,
    images: str | Path | None,
    check_images: str = "decode",
    purpose: str = "training",
) -> Report:
    """`validate_coco` on what `read_coco_json` returned, for one of PURPOSES."""
    if purpose not in PURPOSES:
        raise ValueError(f"purpose: expected one of {', '.join(PURPOSES)}, got {purpose!r}")
    training = purpose == "training"
    if check_images not in IMAGE_CHECKS:
        raise ValueError(f"check_images: expected one of {', '.join(IMAGE_CHECKS)}, got {check_images!r}")
    report = Report(totals={s: len(content[s]) for s in ("images", "categories", "annotations")})
    folder = None if images is None else Path(images)

    seen_ids: set[Any] = set()
    sizes: dict[Any, tuple[int, int] | None] = {}  # usable images: id -> (width, height) where it is known
    image_ids: set[Any] = set()  # every image id in the file, usable or not

    def image_problems(entry: dict) -> Iterator[tuple[str | None, str]]:
        yield from _id_problem(entry, seen_ids, (int, str))
        shape_is_right = True
        for key in ("width", "height"):
            message = _number_problem(entry, key, positive=True, integer=True)
            shape_is_right = shape_is_right and not message
            if message and (training or key in entry):
                yield key, message
        unsure = entry.get("not_exhaustive", [])
        if not isinstance(unsure, list) or not all(_is_id(value, (int,)) for value in unsure):
            yield "not_exhaustive", f"expected a list of category ids, got {_described(unsure)}"
        path_message = _file_name_problem(entry)
        if path_message:
            yield "file_name", path_message
        elif folder is not None:
            size = (entry["width"], entry["height"]) if shape_is_right else None
            message = _picture_problem(folder / entry["file_name"], size, check_images)
            if message:
                yield "file_name", message

    report.images = _check_section(content, "images", str(annotations), image_problems, report.problems)
    for entry in content["images"]:
        if isinstance(entry, dict) and _is_id(entry.get("id"), (int, str)):
            image_ids.add(entry["id"])
    for index in report.images:
        entry = content["images"][index]
        has_size = training or ("width" in entry and "height" in entry)
        sizes[entry["id"]] = (entry["width"], entry["height"]) if has_size else None

    seen_category_ids: set[Any] = set()
    seen_names: set[str] = set()

    def category_problems(entry: dict) -> Iterator[tuple[str | None, str]]:
        yield from _id_problem(entry, seen_category_ids, (int,))
        name = entry.get("name")
        if not isinstance(name, str) or not name.strip():
            yield "name", "missing" if "name" not in entry else f"expected a name, got {_described(name)}"
        elif name in seen_names:
            yield "name", f"duplicate name {name!r}"
        else:
            seen_names.add(name)

    report.categories = _check_section(
        content, "categories", str(annotations), category_problems, report.problems
    )
    category_ids = {content["categories"][index]["id"] for index in report.categories}

    seen_annotation_ids: set[Any] = set()

    def annotation_problems(entry: dict) -> Iterator[tuple[str | None, str]]:
        if training or "id" in entry:
            yield from _id_problem(entry, seen_annotation_ids, (int, str))
        size = None
        image_id = entry.get("image_id")
        if "image_id" not in entry:
            yield "image_id", "missing"
        elif not _is_id(image_id, (int, str)) or image_id not in image_ids:
            yield "image_id", f"expected the id of an image, got {_described(image_id)}"
        elif image_id not in sizes:
            yield "image_id", f"image {image_id!r} is itself wrong"
        else:
            size = sizes[image_id]
        category_id = entry.get("category_id")
        if "category_id" not in entry:
            yield "category_id", "missing"
        elif not _is_id(category_id, (int,)) or category_id not in category_ids:
            yield "category_id", f"unknown category {_described(category_id)}"
        message = _box_problem(entry, size, training)
        if message:
            yield "bbox", message
        message = _number_problem(entry, "area", positive=False, integer=False)
        if message and (training or "area" in entry):
            yield "area", message
        if entry.get("iscrowd", 0) not in (0, 1):
            yield "iscrowd", f"expected 0 or 1, got {_described(entry['iscrowd'])}"
        message = _segmentation_problem(entry.get("segmentation"), size)
        if message and training:
            yield "segmentation", message

    report.annotations = _check_section(
        content, "annotations", str(annotations), annotation_problems, report.problems
    )
    return report


def _check_section(
    content: dict[str, Any],
    section: str,
    file: str,
    problems_of: Callable[[dict], Iterator[tuple[str | None, str]]],
    problems: list[Problem],
) -> list[int]:
    usable = []
    for index, entry in enumerate(content[section]):
        before = len(problems)
        if not isinstance(entry, dict):
            problems.append(
                Problem(file, section, index, None, f"expected an object, got {_described(entry)}")
            )
        else:
            problems.extend(Problem(file, section, index, where, what) for where, what in problems_of(entry))
        if len(problems) == before:
            usable.append(index)
    return usable


def _described(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_id(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _id_problem(entry: dict, seen: set[Any], types: tuple[type, ...]) -> Iterator[tuple[str, str]]:
    value = entry.get("id")
    if "id" not in entry:
        yield "id", "missing"
    elif not _is_id(value, types):
        yield "id", f"expected {' or '.join(t.__name__ for t in types)}, got {_described(value)}"
    elif value in seen:
        yield "id", f"duplicate id {value!r}"
    else:
        seen.add(value)


def _number_problem(entry: dict, key: str, positive: bool, integer: bool) -> str | None:
    if key not in entry:
        return "missing"
    value = entry[key]
    expected = f"a {'positive' if positive else 'non-negative'} {'integer' if integer else 'number'}"
    right_type = _is_number(value) and (not integer or isinstance(value, int) or value.is_integer())
    if not right_type or not math.isfinite(value) or value < 0 or (positive and value == 0):
        return f"expected {expected}, got {_described(value)}"
    return None


def _box_problem(entry: dict, size: tuple[int, int] | None, training: bool) -> str | None:
    if "bbox" not in entry:
        return "missing"
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        return f"expected [x, y, width, height], got {_described(box)}"
    if not all(math.isfinite(value) for value in box):
        return f"expected finite numbers, got {box}"
    x, y, width, height = box
    if training and (width <= 0 or height <= 0):
        return f"expected positive width and height, got {box}"
    if width < 0 or height < 0:
        return f"expected no negative width or height, got {box}"
    if training and size is not None:
        slack = BORDER_TOLERANCE
        inside = (
            x >= -slack and y >= -slack and x + width <= size[0] + slack and y + height <= size[1] + slack
        )
        if not inside or x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0:
            return f"box {box} (x, y, width, height) leaves the {size[0]} x {size[1]} image"
    return None


def _segmentation_problem(segmentation: Any, size: tuple[int, int] | None) -> str | None:
    """None, [] (no mask), polygons [[x, y, ...], ...] or RLE {"size": [height, width], "counts": ...}."""
    if segmentation is None:
        return None
    if isinstance(segmentation, list):
        for number, polygon in enumerate(segmentation):
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                return f"polygon {number}: expected at least 3 points [x, y, ...], got {_described(polygon)}"
            if not all(_is_number(value) and math.isfinite(value) for value in polygon):
                return f"polygon {number}: expected finite numbers, got {_described(polygon)}"
        return None
    if not isinstance(segmentation, dict):
        return f"expected polygons or RLE, got {_described(segmentation)}"
    rle_size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(rle_size, list) or len(rle_size) != 2 or not all(_is_id(v, (int,)) for v in rle_size):
        return f"RLE size: expected [height, width], got {_described(rle_size)}"
    if size is not None and (rle_size[1], rle_size[0]) != size:
        return f"RLE size: expected [{size[1]}, {size[0]}] as the image has, got {rle_size}"
    if isinstance(counts, list):
        if not all(_is_id(value, (int,)) and value >= 0 for value in counts):
            return "RLE counts: expected non-negative integers"
        if sum(counts) != rle_size[0] * rle_size[1]:
            return f"RLE counts: expected a sum of {rle_size[0] * rle_size[1]} pixels, got {sum(counts)}"
    elif not isinstance(counts, str):
        return f"RLE counts: expected a list or a string, got {_described(counts)}"
    return None


def _file_name_problem(entry: dict) -> str | None:
    if "file_name" not in entry:
        return "missing"
    name = entry["file_name"]
    if not isinstance(name, str) or not name or "\0" in name:
        return f"expected a file name, got {_described(name)}"
    if os.path.isabs(name) or ".." in Path(name).parts:
        return f"expected a path inside the image folder, got {name!r}"
    return None


def _picture_problem(path: Path, size: tuple[int, int] | None, check: str) -> str | None:
    if not os.path.isfile(path):  # Path.is_file() raises on a name too long
        return f"missing file {path}"
    if check == "none":
        return None
    try:
        with Image.open(path) as picture:
            stored = picture.size
            if stored[0] * stored[1] > MAX_PIXELS:
                return f"{path}: expected at most {MAX_PIXELS} pixels, got {stored[0]} x {stored[1]}"
            orientation = picture.getexif().get(EXIF_ORIENTATION, 1)
            if check == "decode":
                picture.draft(None, (1, 1))  # JPEG: read all of the file, compute an eighth of the pixels
                picture.load()
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise many types on broken files
        return f"broken image {path}: {type(error).__name__}: {error}"
    turned = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    if size is not None and size not in (stored, turned):
        return f"{path} is {stored[0]} x {stored[1]} pixels, the annotation file says {size[0]} x {size[1]}"
    return None
