"""Pictures with captions or questions and no objects: what the readers of several formats have in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from visionllm.data.coco_pictures import picture_name
from visionllm.data.report import Report, described, file_name_problem, picture_problem, require_image_check
from visionllm.data.sample import Question, Sample
from visionllm.image import open_annotated


@dataclass(frozen=True)
class PictureText:
    """A picture and what is said about it.

    Attributes:
        file_name: relative to the folder of the pictures.
        image_id: the source's own identifier.
        captions, questions: as in `Sample`.
        size: width and height in pixels where the source tells them.
    """

    file_name: str
    image_id: int | str
    captions: dict[str, list[str]] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)
    size: tuple[int, int] | None = None


class PicturesWithText:
    """Samples without objects, whose vocabulary is empty: of no name it is known whether it is there.

    Attributes:
        entries: what is said about each picture.
        report: what is wrong with the file, and which of its entries are used.
    """

    def __init__(
        self, entries: Sequence[PictureText], images: str | Path, report: Report, on_error: str, shown: int
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise ValueError(f"on_error: expected fail or skip, got {on_error!r}")
        if on_error == "fail":
            report.raise_if_any(shown)
        self.entries, self.folder, self.report = list(entries), Path(images), report

    @property
    def skipped(self) -> dict[str, int]:
        """How many entries of each of the file's lists were left out because something is wrong with them."""
        return self.report.skipped

    def __len__(self) -> int:
        return len(self.entries)

    def image_path(self, index: int) -> Path:
        return self.folder / picture_name(self.folder, self.entries[index].file_name)

    def __getitem__(self, index: int) -> Sample:
        """The picture with its text.

        Raises:
            IndexError: no such picture.
            ImageError: the picture's file broke since the data set was opened, or was not checked.
        """
        entry = self.entries[index]
        return Sample(
            image=open_annotated(self.image_path(index), entry.size),
            boxes=np.zeros((0, 4), np.float32),
            names=[],
            area=np.zeros(0, np.float32),
            iscrowd=np.zeros(0, bool),
            image_id=entry.image_id,
            vocabulary=(),
            captions={length: list(texts) for length, texts in entry.captions.items()},
            questions=list(entry.questions),
        )


class PictureCheck:
    """Finds out what is wrong with an entry's picture; of several entries' picture, once.

    Args:
        images: the folder; None: the file's name only.
        check_images: how far the file is read, as in `visionllm.data.validate.validate_coco`.
    """

    def __init__(self, images: str | Path | None, check_images: str) -> None:
        require_image_check(check_images)
        self.folder = None if images is None else Path(images)
        self.check_images = check_images
        self._known: dict[tuple[str, tuple[int, int] | None], str | None] = {}

    def __call__(
        self, entry: dict, key: str, size: tuple[int, int] | None = None, look: bool = True
    ) -> str | None:
        """The problem with ``entry[key]``; its file is looked at if ``look``."""
        message = file_name_problem(entry, key)
        if message or self.folder is None or not look:
            return message
        name = entry[key]
        if (name, size) not in self._known:
            path = self.folder / picture_name(self.folder, name)
            self._known[name, size] = picture_problem(path, size, self.check_images)
        return self._known[name, size]


def one_line(text: str) -> str:
    """The text with single spaces for whatever space it has."""
    return " ".join(text.split())


def texts_problem(entries: Any, key: str, what: str) -> str | None:
    """What is wrong with a list of objects that each have some text under ``key``."""
    if not isinstance(entries, list) or not entries:
        return f"expected a list of {what}, got {described(entries)}"
    for number, one in enumerate(entries):
        text = one.get(key) if isinstance(one, dict) else None
        if not isinstance(text, str) or not text.strip():
            return f'{what} {number}: expected "{key}" with text, got {described(one)}'
    return None


def wanted_parts(split: str, parts: Collection[str]) -> set[str]:
    """The parts in a text like "train+restval". Raises ValueError for one that is none of ``parts``."""
    wanted = split.split("+")
    for part in wanted:
        if part not in parts:
            raise ValueError(
                f"split: expected one of {', '.join(parts)}, or several joined by +, got {split!r}"
            )
    return set(wanted)
