"""Captions of pictures as COCO writes them: ``captions_*.json`` with ``images`` and ``annotations``.

An annotation has ``id``, ``image_id`` and ``caption``; a picture usually has five.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visionllm.data.pictures_with_text import PictureCheck, PicturesWithText, PictureText, one_line
from visionllm.data.report import (
    EntryProblems,
    Report,
    check_section,
    described,
    id_problem,
    is_id,
    number_problem,
    read_json,
    require_lists,
    text_problem,
)


class CocoCaptionDataset(PicturesWithText):
    """The pictures of a caption file that have captions, with these as "short" ones and without objects.

    `visionllm.data.coco.CocoDataset` gives captions together with objects.

    Args:
        annotations: the JSON file; ``file_name`` is needed here.
        images: folder of the pictures (see `visionllm.data.coco_pictures`).
        on_error, check_images, shown: as for `CocoDataset`.

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
        content = _read(annotations)
        report = _check(content, annotations, PictureCheck(images, check_images))
        captions = _by_image(content, report)
        pictures = [content["images"][index] for index in report.images]
        entries = [
            PictureText(image["file_name"], image["id"], {"short": captions[image["id"]]}, size=_size(image))
            for image in pictures
            if image["id"] in captions
        ]
        super().__init__(entries, images, report, on_error, shown)


def validate_captions(
    annotations: str | Path, images: str | Path | None, check_images: str = "decode"
) -> Report:
    """As `visionllm.data.validate.validate_coco`, for a caption file."""
    return _check(_read(annotations), annotations, PictureCheck(images, check_images))


def read_captions(file: str | Path) -> tuple[dict[Any, list[str]], Report]:
    """The usable captions by image id, in file order, and what is wrong with the others.

    Pictures are only told by their ids here: they are another file's.

    Raises:
        DatasetError: the file is missing, is no JSON, or lacks one of its lists.
    """
    content = _read(file)
    report = _check(content, file, None)
    return _by_image(content, report), report


def _read(file: str | Path) -> dict[str, Any]:
    return require_lists(read_json(file, "a COCO caption file"), file, ("images", "annotations"))


def _check(content: dict[str, Any], file: str | Path, picture_problem: PictureCheck | None) -> Report:
    image_ids: set[Any] = set()
    seen: set[Any] = set()

    def image_problems(entry: dict) -> EntryProblems:
        yield from id_problem(entry, image_ids, (int, str))
        size_is_right = True
        for key in ("width", "height"):
            message = number_problem(entry, key, positive=True, integer=True) if key in entry else None
            size_is_right = size_is_right and not message
            if message:
                yield key, message
        if picture_problem is not None:
            message = picture_problem(entry, "file_name", _size(entry) if size_is_right else None)
            if message:
                yield "file_name", message

    def caption_problems(entry: dict) -> EntryProblems:
        yield from id_problem(entry, seen, (int, str))
        image_id = entry.get("image_id")
        if "image_id" not in entry:
            yield "image_id", "missing"
        elif not is_id(image_id, (int, str)) or image_id not in image_ids:
            yield "image_id", f"expected the id of an image, got {described(image_id)}"
        elif image_id not in usable:
            yield "image_id", f"image {image_id!r} is itself wrong"
        message = text_problem(entry, "caption", "a caption")
        if message:
            yield "caption", message

    report = Report()
    check_section(content["images"], "images", file, image_problems, report)
    usable = {content["images"][index]["id"] for index in report.images}
    check_section(content["annotations"], "annotations", file, caption_problems, report)
    return report


def _by_image(content: dict[str, Any], report: Report) -> dict[Any, list[str]]:
    captions: dict[Any, list[str]] = {}
    for index in report.annotations:
        entry = content["annotations"][index]
        captions.setdefault(entry["image_id"], []).append(one_line(entry["caption"]))
    return captions


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    return (int(image["width"]), int(image["height"])) if "width" in image and "height" in image else None
