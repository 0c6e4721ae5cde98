"""Where a COCO picture lies: the same photo has one name in the 2014 release and another in the 2017 one.

``COCO_train2014_000000581857.jpg`` and ``000000581857.jpg`` are one picture, and which folder the 2017 one is
in does not follow from the 2014 one. So annotations made for one release are used with the other's files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from visionllm.data.report import file_name_problem

_ID = re.compile(r"(\d{12})\.jpg$")
_FOLDERS = ("", "train2017", "val2017", "train2014", "val2014")


def picture_name(folder: str | Path, name: str) -> str:
    """A picture's path in ``folder``: ``name`` if it is there, otherwise where the same photo is found.

    Args:
        folder: of the pictures, or of the releases' folders (``train2017``, ...).
        name: as an annotation file has it.

    Returns:
        The path relative to ``folder``; ``name`` itself where the photo is nowhere.
    """
    if _is_file(folder, name):
        return name
    base = name.rsplit("/", 1)[-1]
    names = [base]
    found = _ID.search(base)
    if found:
        number = found[1]
        names += [f"{number}.jpg", f"COCO_train2014_{number}.jpg", f"COCO_val2014_{number}.jpg"]
    for place in _FOLDERS:
        for candidate in names:
            path = f"{place}/{candidate}" if place else candidate
            if _is_file(folder, path):
                return path
    return name


def _is_file(folder: str | Path, name: str) -> bool:
    try:
        return os.path.isfile(os.path.join(folder, name))
    except ValueError:  # a name with a NUL character
        return False


def find_pictures(content: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """A COCO-format content whose pictures' ``file_name`` is where `picture_name` finds them."""
    return {**content, "images": [_found(entry, folder) for entry in content["images"]]}


def _found(entry: Any, folder: str | Path) -> Any:
    if not isinstance(entry, dict) or file_name_problem(entry):
        return entry  # wrong, and named so by whoever checks it
    return {**entry, "file_name": picture_name(folder, entry["file_name"])}
