"""Captions of pictures as COCO writes them: ``captions_*.json`` with ``images`` and ``annotations``.

An annotation has ``id``, ``image_id`` and ``caption``; a picture usually has five.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visionllm.data.report import (
    EntryProblems,
    Report,
    check_section,
    described,
    id_problem,
    is_id,
    read_json,
    require_lists,
    text_problem,
)


def read_captions(file: str | Path) -> tuple[dict[Any, list[str]], Report]:
    """The usable captions by image id, in file order, and what is wrong with the others.

    Raises:
        DatasetError: the file is missing, is no JSON, or lacks one of its lists.
    """
    content = require_lists(read_json(file, "a COCO caption file"), file, ("images", "annotations"))
    report = Report()
    image_ids: set[Any] = set()
    seen: set[Any] = set()

    def image_problems(entry: dict) -> EntryProblems:
        yield from id_problem(entry, image_ids, (int, str))

    def caption_problems(entry: dict) -> EntryProblems:
        yield from id_problem(entry, seen, (int, str))
        image_id = entry.get("image_id")
        if "image_id" not in entry:
            yield "image_id", "missing"
        elif not is_id(image_id, (int, str)) or image_id not in image_ids:
            yield "image_id", f"expected the id of an image, got {described(image_id)}"
        message = text_problem(entry, "caption", "a caption")
        if message:
            yield "caption", message

    check_section(content["images"], "images", file, image_problems, report)
    usable = check_section(content["annotations"], "annotations", file, caption_problems, report)
    captions: dict[Any, list[str]] = {}
    for index in usable:
        entry = content["annotations"][index]
        captions.setdefault(entry["image_id"], []).append(" ".join(entry["caption"].split()))
    return captions, report
