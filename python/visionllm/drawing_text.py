"""Letters in drawings: fonts, shortening, and lines of text below a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]

PAPER, INK, QUIET_INK = (250, 250, 250), (20, 20, 20), (110, 110, 110)
MAX_ROWS = 24  # below one picture; the rest is in the result's text


@dataclass(frozen=True)
class Line:
    """One entry below a picture.

    dot: colour of a dot before it; quiet: in grey.
    """

    text: str
    dot: Colour | None = None
    quiet: bool = False


def with_lines_below(picture: Image.Image, lines: Sequence[Line]) -> Image.Image:
    """The picture with the lines written below it, in its width; without lines the picture itself."""
    font = label_font(picture.size)
    row = _line_height(font)
    indent = row if any(line.dot is not None for line in lines) else 0
    width = picture.width - 2 * _margin(row) - indent
    rows = []
    for line in lines:
        first, *others = wrapped(line.text, font, width)
        rows.append([(0, replace(line, text=first))])
        rows += [[(0, replace(line, text=text, dot=None))] for text in others]
    return _with_rows_below(picture, rows, indent)


def with_legend_below(picture: Image.Image, entries: Sequence[Line]) -> Image.Image:
    """The picture with the entries below it, as many side by side as its width allows."""
    font = label_font(picture.size)
    row = _line_height(font)
    indent = row if any(entry.dot is not None for entry in entries) else 0
    width = picture.width - 2 * _margin(row)
    rows: list[list[tuple[int, Line]]] = []
    left = 0
    for entry in entries:
        entry = replace(entry, text=shortened(entry.text, font, width - indent))
        needed = indent + round(font.getlength(entry.text))
        if not rows or left + needed > width:
            rows.append([])
            left = 0
        rows[-1].append((left, entry))
        left += needed + row
    return _with_rows_below(picture, rows, indent)


def _with_rows_below(
    picture: Image.Image, rows: Sequence[Sequence[tuple[int, Line]]], indent: int
) -> Image.Image:
    """rows: of (pixels from the left margin, entry); indent: of an entry's text, behind its dot."""
    if not rows:
        return picture
    if len(rows) > MAX_ROWS:
        rows = [*rows[: MAX_ROWS - 1], [(0, Line("…", quiet=True))]]
    font = label_font(picture.size)
    row = _line_height(font)
    margin = _margin(row)
    paper = Image.new("RGB", (picture.width, picture.height + len(rows) * row + 2 * margin), PAPER)
    paper.paste(picture)
    draw = ImageDraw.Draw(paper)
    for number, entries in enumerate(rows):
        top = picture.height + margin + number * row
        for left, entry in entries:
            if entry.dot is not None:
                radius, x, y = row / 4, margin + left + row / 3, top + row / 2
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=entry.dot)
            ink = QUIET_INK if entry.quiet else INK
            draw.text((margin + left + indent, top), entry.text, fill=ink, font=font)
    return paper


def wrapped(text: str, font: Font, width: float) -> Iterator[str]:
    """The text in pieces that are at most ``width`` pixels wide, cut at spaces, or else within words."""
    for paragraph in text.splitlines() or [""]:
        piece = ""
        for word in paragraph.split(" "):
            longer = f"{piece} {word}" if piece else word
            if font.getlength(longer) <= width:
                piece = longer
                continue
            if piece:
                yield piece
            piece = word
            while len(piece) > 1 and font.getlength(piece) > width:
                count = _fitting(piece, font, width)
                yield piece[:count]
                piece = piece[count:]
        yield piece


def shortened(text: str, font: Font, width: float) -> str:
    """The text, or its beginning with an ellipsis, at most ``width`` pixels wide where that can be."""
    if font.getlength(text) <= width:
        return text
    return text[: _fitting(text, font, width - font.getlength("…"))].rstrip() + "…"


def _fitting(text: str, font: Font, width: float) -> int:
    """How many letters, one or more, are at most ``width`` pixels wide."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle]) <= width:
            low = middle
        else:
            high = middle - 1
    return low


def _margin(row: int) -> int:
    return max(row // 3, 2)


def _line_height(font: Font) -> int:
    _, top, _, bottom = font.getbbox("Ágjy")
    return round(1.25 * (bottom + max(top, 0) / 2))


def label_font(size: tuple[int, int]) -> Font:
    """The font of labels in a picture of this (width, height)."""
    return _font(max(11, round(min(size) / 32)))


@lru_cache(maxsize=16)
def _font(size: int) -> Font:
    """DejaVu Sans, for its many scripts, from matplotlib's files; Pillow's own font without them."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)
