"""What is wrong with a COCO-format data set: every problem by file, index and field.

A COCO annotation file is one JSON object with three lists::

    images       id, file_name, width, height
    categories   id, name
    annotations  id, image_id, category_id, bbox [x, y, width, height] in pixels, area,
                 optional iscrowd, segmentation, keypoints

A category with keypoints lists their names under ``keypoints``; its annotations then have ``[x, y, v, ...]``,
three numbers a name, with v 0 for a point that is not labelled, 1 for a hidden and 2 for a visible one.

Every entry is checked once (linear time), and an entry that refers to a wrong one is wrong too. A box may
leave its picture by ``BORDER_TOLERANCE`` pixels.

That is what training needs, where a wrong box does harm. Evaluation takes a set as it is: boxes may leave
their picture or be empty; sizes, areas and the ids of annotations may be missing; no mask and no keypoint is
looked at.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from visionllm.data.report import (
    IMAGE_CHECKS,
    DatasetError,
    Problem,
    Report,
    check_section,
    described,
    file_name_problem,
    id_problem,
    is_id,
    is_number,
    number_problem,
    picture_problem,
    read_json,
    require_image_check,
    require_lists,
)

__all__ = [
    "IMAGE_CHECKS",
    "PURPOSES",
    "DatasetError",
    "Problem",
    "Report",
    "read_coco_json",
    "validate_coco",
    "validate_content",
]

BORDER_TOLERANCE = 1.0  # pixels; what rounding, or counting pixels from 1, makes of a box at the border
PURPOSES = ("training", "evaluation")
SECTIONS = ("images", "categories", "annotations")


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
    content = read_json(annotations, "a COCO annotation file")
    return require_lists(content, annotations, SECTIONS)


def validate_content(
    content: dict[str, Any],
    annotations: str | Path,
    images: str | Path | None,
    check_images: str = "decode",
    purpose: str = "training",
    wanted: Collection[Any] | None = None,
) -> Report:
    """`validate_coco` on what `read_coco_json` returned, for one of PURPOSES.

    Only the files of the pictures with ``wanted`` ids are looked at, None: of all of them.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"purpose: expected one of {', '.join(PURPOSES)}, got {purpose!r}")
    training = purpose == "training"
    require_image_check(check_images)
    report = Report()
    folder = None if images is None else Path(images)

    seen_ids: set[Any] = set()
    sizes: dict[Any, tuple[int, int] | None] = {}  # usable images: id -> (width, height) where it is known
    image_ids: set[Any] = set()  # every image id in the file, usable or not

    def image_problems(entry: dict) -> Iterator[tuple[str | None, str]]:
        yield from id_problem(entry, seen_ids, (int, str))
        shape_is_right = True
        for key in ("width", "height"):
            message = number_problem(entry, key, positive=True, integer=True)
            shape_is_right = shape_is_right and not message
            if message and (training or key in entry):
                yield key, message
        unsure = entry.get("not_exhaustive", [])
        if not isinstance(unsure, list) or not all(is_id(value, (int,)) for value in unsure):
            yield "not_exhaustive", f"expected a list of category ids, got {described(unsure)}"
        path_message = file_name_problem(entry)
        if path_message:
            yield "file_name", path_message
        elif folder is not None and (wanted is None or _among(entry.get("id"), wanted)):
            size = (entry["width"], entry["height"]) if shape_is_right else None
            message = picture_problem(folder / entry["file_name"], size, check_images)
            if message:
                yield "file_name", message

    check_section(content["images"], "images", annotations, image_problems, report)
    for entry in content["images"]:
        if isinstance(entry, dict) and is_id(entry.get("id"), (int, str)):
            image_ids.add(entry["id"])
    for index in report.images:
        entry = content["images"][index]
        has_size = training or ("width" in entry and "height" in entry)
        sizes[entry["id"]] = (entry["width"], entry["height"]) if has_size else None

    seen_category_ids: set[Any] = set()
    seen_names: set[str] = set()

    def category_problems(entry: dict) -> Iterator[tuple[str | None, str]]:
        yield from id_problem(entry, seen_category_ids, (int,))
        name = entry.get("name")
        if not isinstance(name, str) or not name.strip():
            yield "name", "missing" if "name" not in entry else f"expected a name, got {described(name)}"
        elif name in seen_names:
            yield "name", f"duplicate name {name!r}"
        else:
            seen_names.add(name)
        message = _keypoint_names_problem(entry.get("keypoints", []))
        if message and training:
            yield "keypoints", message

    check_section(content["categories"], "categories", annotations, category_problems, report)
    usable_categories = [content["categories"][index] for index in report.categories]
    category_ids = {category["id"] for category in usable_categories}
    point_counts = {category["id"]: len(category.get("keypoints", ())) for category in usable_categories}

    seen_annotation_ids: set[Any] = set()

    def annotation_problems(entry: dict) -> Iterator[tuple[str | None, str]]:
        if training or "id" in entry:
            yield from id_problem(entry, seen_annotation_ids, (int, str))
        size = None
        image_id = entry.get("image_id")
        if "image_id" not in entry:
            yield "image_id", "missing"
        elif not is_id(image_id, (int, str)) or image_id not in image_ids:
            yield "image_id", f"expected the id of an image, got {described(image_id)}"
        elif image_id not in sizes:
            yield "image_id", f"image {image_id!r} is itself wrong"
        else:
            size = sizes[image_id]
        category_id = entry.get("category_id")
        if "category_id" not in entry:
            yield "category_id", "missing"
        elif not is_id(category_id, (int,)) or category_id not in category_ids:
            yield "category_id", f"unknown category {described(category_id)}"
        message = _box_problem(entry, size, training)
        if message:
            yield "bbox", message
        message = number_problem(entry, "area", positive=False, integer=False)
        if message and (training or "area" in entry):
            yield "area", message
        if entry.get("iscrowd", 0) not in (0, 1):
            yield "iscrowd", f"expected 0 or 1, got {described(entry['iscrowd'])}"
        message = _segmentation_problem(entry.get("segmentation"), size)
        if message and training:
            yield "segmentation", message
        if training and "keypoints" in entry and is_id(category_id, (int,)) and category_id in category_ids:
            message = _keypoints_problem(entry["keypoints"], point_counts[category_id], size)
            if message:
                yield "keypoints", message

    check_section(content["annotations"], "annotations", annotations, annotation_problems, report)
    return report


def _among(value: Any, wanted: Collection[Any]) -> bool:
    return is_id(value, (int, str)) and value in wanted


def _box_problem(entry: dict, size: tuple[int, int] | None, training: bool) -> str | None:
    if "bbox" not in entry:
        return "missing"
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(value) for value in box):
        return f"expected [x, y, width, height], got {described(box)}"
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
                return f"polygon {number}: expected at least 3 points [x, y, ...], got {described(polygon)}"
            if not all(is_number(value) and math.isfinite(value) for value in polygon):
                return f"polygon {number}: expected finite numbers, got {described(polygon)}"
        return None
    if not isinstance(segmentation, dict):
        return f"expected polygons or RLE, got {described(segmentation)}"
    rle_size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(rle_size, list) or len(rle_size) != 2 or not all(is_id(v, (int,)) for v in rle_size):
        return f"RLE size: expected [height, width], got {described(rle_size)}"
    if size is not None and (rle_size[1], rle_size[0]) != size:
        return f"RLE size: expected [{size[1]}, {size[0]}] as the image has, got {rle_size}"
    if isinstance(counts, list):
        if not all(is_id(value, (int,)) and value >= 0 for value in counts):
            return "RLE counts: expected non-negative integers"
        if sum(counts) != rle_size[0] * rle_size[1]:
            return f"RLE counts: expected a sum of {rle_size[0] * rle_size[1]} pixels, got {sum(counts)}"
    elif not isinstance(counts, str):
        return f"RLE counts: expected a list or a string, got {described(counts)}"
    else:
        pixels = compressed_pixels(counts)
        if pixels != rle_size[0] * rle_size[1]:
            expected = f"a string for {rle_size[0] * rle_size[1]} pixels"
            return f"RLE counts: expected {expected}, got " + (
                "none" if pixels is None else f"one for {pixels}"
            )
    return None


def compressed_pixels(counts: str) -> int | None:
    """How many pixels COCO's compressed RLE string is for; None where it is no such string.

    A run's length is given in groups of five bits, the lowest first, from character 48 on; bit 5 says that
    another follows, and the last one's bit 4 is the sign. From the fourth run on it is the difference to the
    last but one. (pycocotools trusts what it is given.)
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        if runs[-1] < 0:
            return None
        value = shift = 0
    return sum(runs) if shift == 0 else None


def _keypoint_names_problem(names: Any) -> str | None:
    right = isinstance(names, list) and all(isinstance(name, str) and name.strip() for name in names)
    if not right or len(set(names)) < len(names):
        return f"expected a list of different names, got {described(names)}"
    return None


def _keypoints_problem(points: Any, count: int, size: tuple[int, int] | None) -> str | None:
    """``count`` is the number of names in the category."""
    if not isinstance(points, list) or len(points) != 3 * count or not all(map(is_number, points)):
        return f"expected [x, y, v, ...], {3 * count} numbers for {count} points, got {described(points)}"
    for number in range(count):
        x, y, flag = points[3 * number : 3 * number + 3]
        if flag not in (0, 1, 2):
            return f"point {number}: expected v 0, 1 or 2, got {described(flag)}"
        slack = BORDER_TOLERANCE
        width, height = size or (math.inf, math.inf)
        if flag and not (-slack <= x <= width + slack and -slack <= y <= height + slack):
            return f"point {number}: expected x, y in the {width} x {height} image, got {x}, {y}"
    return None
