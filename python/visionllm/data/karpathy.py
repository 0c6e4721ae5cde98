"""Karpathy's splits of COCO's captions: ``dataset_coco.json`` (Karpathy and Fei-Fei 2015, arXiv:1412.2306).

Captioning results are reported on its 5000 test pictures. One list, ``images``, has for each of them::

    filepath ("val2014"), filename, cocoid, split ("train", "restval", "val" or "test"),
    sentences: [{"raw": "A man with a red helmet on a small moped.", "tokens": [...], ...}, ...]

``restval`` is what is left of COCO's 2014 validation set; training uses "train+restval". The author's
``dataset_flickr30k.json`` and ``dataset_flickr8k.json``, with ``imgid`` and no ``filepath``, are read too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visionllm.data.pictures_with_text import (
    PictureCheck,
    PicturesWithText,
    PictureText,
    one_line,
    texts_problem,
    wanted_parts,
)
from visionllm.data.report import (
    EntryProblems,
    Report,
    check_section,
    described,
    id_problem,
    read_json,
    require_lists,
    text_problem,
)

SPLITS = ("train", "restval", "val", "test")


class KarpathyDataset(PicturesWithText):
    """The pictures of some of the parts with their captions, as "short" ones.

    Args:
        annotations: the JSON file.
        images: folder of the pictures (for COCO's see `visionllm.data.coco_pictures`).
        split: one of `SPLITS`, or several joined by "+".
        on_error, check_images, shown: as for `visionllm.data.coco.CocoDataset`; only pictures of the chosen
            parts need to be there.

    Raises:
        DatasetError: something is wrong and ``on_error`` is "fail", or the JSON cannot be used at all.
        ValueError: an argument is none of the allowed ones.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        split: str = "train+restval",
        on_error: str = "fail",
        check_images: str = "decode",
        shown: int = 20,
    ) -> None:
        wanted = wanted_parts(split, SPLITS)
        content = require_lists(read_json(annotations), annotations, ("images",))
        report = _check(content, annotations, images, check_images, wanted)
        chosen = [content["images"][index] for index in report.images]
        entries = [
            PictureText(
                file_name=_file_name(image),
                image_id=image["cocoid"] if "cocoid" in image else image["imgid"],
                captions={"short": [one_line(sentence["raw"]) for sentence in image["sentences"]]},
            )
            for image in chosen
            if image["split"] in wanted
        ]
        super().__init__(entries, images, report, on_error, shown)


def validate_karpathy(
    annotations: str | Path, images: str | Path | None, check_images: str = "decode"
) -> Report:
    """As `visionllm.data.validate.validate_coco`, for a file of Karpathy's splits."""
    content = require_lists(read_json(annotations), annotations, ("images",))
    return _check(content, annotations, images, check_images, set(SPLITS))


def _check(
    content: dict[str, Any], file: str | Path, images: str | Path | None, check_images: str, wanted: set[str]
) -> Report:
    picture_problem = PictureCheck(images, check_images)
    seen: set[Any] = set()

    def problems(entry: dict) -> EntryProblems:
        yield from id_problem(entry, seen, (int, str), "cocoid" if "cocoid" in entry else "imgid")
        message = text_problem(entry, "split")
        if not message and entry["split"] not in SPLITS:
            message = f"expected one of {', '.join(SPLITS)}, got {described(entry['split'])}"
        if message:
            yield "split", message
        message = text_problem(entry, "filename", "a file name")
        if not message and not isinstance(entry.get("filepath", ""), str):
            yield "filepath", f"expected a folder's name, got {described(entry['filepath'])}"
        elif not message:
            look = isinstance(entry.get("split"), str) and entry["split"] in wanted
            message = picture_problem({"filename": _file_name(entry)}, "filename", look=look)
        if message:
            yield "filename", message
        message = texts_problem(entry.get("sentences"), "raw", "sentences")
        if message:
            yield "sentences", message

    report = Report()
    check_section(content["images"], "images", file, problems, report)
    return report


def _file_name(image: dict[str, Any]) -> str:
    folder = image.get("filepath", "")
    return f"{folder}/{image['filename']}" if folder else image["filename"]
