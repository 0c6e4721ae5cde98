"""What is wrong with a file of annotations: problems by file, list, index and field, and how they are found.

The readers of all the data sets' formats share this: `read_json` makes sure of the file's outline,
`check_section` goes through one list of it, and a `Report` says what is wrong and what can be used.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from visionllm.image import MAX_PIXELS

IMAGE_CHECKS = ("decode", "header", "none")
EXIF_ORIENTATION = 0x0112

# Field by field, what is wrong with an entry: (field or None, message).
EntryProblems = Iterator[tuple["str | None", str]]


@dataclass(frozen=True)
class Problem:
    """One wrong thing. ``section`` and ``index`` are None where the file as a whole is wrong."""

    file: str
    section: str | None  # the list in the file, such as "images"
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
        problems: everything wrong, list by list, in file order within each.
        usable: per list of the file, the positions of the entries without any problem.
        totals: how many entries each list has, right or wrong.
    """

    problems: list[Problem] = field(default_factory=list)
    usable: dict[str, list[int]] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)

    @property
    def images(self) -> list[int]:
        return self.usable.get("images", [])

    @property
    def categories(self) -> list[int]:
        return self.usable.get("categories", [])

    @property
    def annotations(self) -> list[int]:
        return self.usable.get("annotations", [])

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def skipped(self) -> dict[str, int]:
        """How many entries of each list are unusable."""
        return {section: total - len(self.usable.get(section, ())) for section, total in self.totals.items()}

    def add(self, other: Report, kind: str) -> None:
        """Takes over another file's problems, and its lists with ``kind`` before their names."""
        self.problems.extend(other.problems)
        self.usable.update((f"{kind} {section}", entries) for section, entries in other.usable.items())
        self.totals.update((f"{kind} {section}", total) for section, total in other.totals.items())

    def raise_if_any(self, shown: int = 20) -> None:
        """Raise `DatasetError` with the first ``shown`` problems and the count, if there is a problem."""
        if self.problems:
            raise DatasetError(self.problems, shown)

    def __str__(self) -> str:
        counts = ", ".join(
            f"{len(self.usable.get(section, ()))} of {total} {section}"
            for section, total in self.totals.items()
        )
        return f"{len(self.problems)} problems; usable: {counts}"


def wrong_file(file: str | Path, message: str, section: str | None = None) -> DatasetError:
    """The error of a file in which nothing can be checked."""
    return DatasetError([Problem(str(file), section, None, None, message)])


def read_file(file: str | Path) -> bytes:
    """The file's bytes. Raises `DatasetError` where there is none or it cannot be read."""
    try:
        with open(file, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        raise wrong_file(file, "expected an annotation file, found nothing there") from None
    except OSError as error:
        raise wrong_file(file, f"cannot be read: {error.strerror}") from error


def read_json(file: str | Path, what: str = "an annotation file") -> Any:
    """The file's JSON. Raises `DatasetError` where it is missing, no JSON, or nested too deeply."""
    content = read_file(file)
    try:
        return json.loads(content)
    except ValueError as error:  # no JSON, no UTF-8, or a number of more digits than Python reads
        raise wrong_file(file, f"expected JSON: {error}") from error
    except RecursionError as error:
        raise wrong_file(file, f"expected {what}, got JSON nested too deeply") from error


def require_lists(content: Any, file: str | Path, sections: Sequence[str]) -> dict[str, Any]:
    """The content, an object with these lists. Raises `DatasetError` otherwise."""
    if not isinstance(content, dict):
        listed = ", ".join(sections[:-1]) + " and " * (len(sections) > 1) + sections[-1]
        raise wrong_file(file, f"expected an object with {listed}, got {described(content)}")
    for section in sections:
        if section not in content:
            raise wrong_file(file, "missing", section)
        if not isinstance(content[section], list):
            raise wrong_file(file, f"expected a list, got {described(content[section])}", section)
    return content


def check_section(
    entries: Sequence[Any],
    section: str,
    file: str | Path,
    problems_of: Callable[[dict], EntryProblems],
    report: Report,
) -> list[int]:
    """Checks one list and enters it in the report; returns the positions of its usable entries."""
    usable = []
    for index, entry in enumerate(entries):
        before = len(report.problems)
        if not isinstance(entry, dict):
            message = f"expected an object, got {described(entry)}"
            report.problems.append(Problem(str(file), section, index, None, message))
        else:
            found = (Problem(str(file), section, index, where, what) for where, what in problems_of(entry))
            report.problems.extend(found)
        if len(report.problems) == before:
            usable.append(index)
    report.usable[section], report.totals[section] = usable, len(entries)
    return usable


def described(value: Any) -> str:
    """Type and value for a message, short however large or deep the value is."""
    shown = repr(value) if isinstance(value, (str, int, float)) else _BOUNDED.repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


_BOUNDED = reprlib.Repr()
_BOUNDED.maxlevel = 3
_BOUNDED.maxlist = _BOUNDED.maxdict = _BOUNDED.maxtuple = 8
_BOUNDED.maxstring = _BOUNDED.maxother = 60


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_id(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def id_problem(
    entry: dict, seen: set[Any], types: tuple[type, ...], key: str = "id"
) -> Iterator[tuple[str, str]]:
    """What is wrong with an entry's own id; a right one joins ``seen``."""
    value = entry.get(key)
    if key not in entry:
        yield key, "missing"
    elif not is_id(value, types):
        yield key, f"expected {' or '.join(t.__name__ for t in types)}, got {described(value)}"
    elif value in seen:
        yield key, f"duplicate id {value!r}"
    else:
        seen.add(value)


def number_problem(entry: dict, key: str, positive: bool, integer: bool) -> str | None:
    if key not in entry:
        return "missing"
    value = entry[key]
    expected = f"a {'positive' if positive else 'non-negative'} {'integer' if integer else 'number'}"
    right_type = is_number(value) and (not integer or isinstance(value, int) or value.is_integer())
    if not right_type or not math.isfinite(value) or value < 0 or (positive and value == 0):
        return f"expected {expected}, got {described(value)}"
    return None


def text_problem(entry: dict, key: str, what: str = "text") -> str | None:
    """What is wrong with a field that must hold some text."""
    if key not in entry:
        return "missing"
    value = entry[key]
    return None if isinstance(value, str) and value.strip() else f"expected {what}, got {described(value)}"


def file_name_problem(entry: dict, key: str = "file_name") -> str | None:
    if key not in entry:
        return "missing"
    name = entry[key]
    if not isinstance(name, str) or not name or "\0" in name:
        return f"expected a file name, got {described(name)}"
    if os.path.isabs(name) or ".." in Path(name).parts:
        return f"expected a path inside the image folder, got {name!r}"
    return None


def picture_problem(path: Path, size: tuple[int, int] | None, check: str) -> str | None:
    """What is wrong with a picture's file, looked at as thoroughly as ``check``, of IMAGE_CHECKS, says."""
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


def require_image_check(check_images: str) -> None:
    """Raise ValueError for a value that is none of IMAGE_CHECKS."""
    if check_images not in IMAGE_CHECKS:
        raise ValueError(f"check_images: expected one of {', '.join(IMAGE_CHECKS)}, got {check_images!r}")
