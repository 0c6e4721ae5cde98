"""Boxes and labels drawn into a picture: one colour a class, labels that keep out of each other's way."""

from __future__ import annotations

import colorsys
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from visionllm.result import Boxes

Rectangle = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels

GOLDEN_ANGLE = 0.381966  # share of the hue circle; neighbouring classes get colours far apart


def draw_boxes(image: np.ndarray, boxes: Boxes, scale: float = 1.0) -> Image.Image:
    """A copy of the picture with every box, its class name and its score.

    Args:
        image: uint8 RGB ``[H, W, 3]``.
        boxes: in pixels of ``image``; the best is drawn last, on top.
        scale: enlargement of the picture; line width and letters follow the size of the enlarged picture.
    """
    canvas = Image.fromarray(image)
    if scale != 1.0:
        size = (max(round(canvas.width * scale), 1), max(round(canvas.height * scale), 1))
        canvas = canvas.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(canvas, "RGBA")
    shorter = min(canvas.size)
    line = max(2, round(shorter / 220))
    font = label_font(max(11, round(shorter / 32)))
    objects = list(boxes)
    for box in reversed(objects):
        draw.rectangle(_enlarged(box.xyxy, scale), outline=class_colour(box.label), width=line)
    taken: list[Rectangle] = []
    for box in objects:
        text = f"{box.name} {box.score:.2f}"
        left, top, right, bottom = font.getbbox(text)
        width, height = right - left + 2 * line, bottom - top + 2 * line
        place = place_label(_enlarged(box.xyxy, scale), (width, height), canvas.size, taken)
        taken.append(place)
        colour = class_colour(box.label)
        draw.rectangle(place, fill=(*colour, 225))
        draw.text((place[0] + line - left, place[1] + line - top), text, fill=text_colour(colour), font=font)
    return canvas


def _enlarged(xyxy: Rectangle, scale: float) -> Rectangle:
    x1, y1, x2, y2 = (value * scale for value in xyxy)
    return x1, y1, max(x1, x2), max(y1, y2)


def place_label(
    box: Rectangle, label: tuple[float, float], canvas: tuple[int, int], taken: list[Rectangle]
) -> Rectangle:
    """Where a label of this (width, height) goes.

    Inside the canvas, covering the labels that are there as little as can be; above the box rather than
    inside it, and inside rather than below.
    """
    x1, y1, x2, y2 = box
    width, height = label
    candidates = [
        (x1, y1 - height),
        (x2 - width, y1 - height),
        (x1, y1),
        (x2 - width, y1),
        (x1, y2),
        (x1, y2 - height),
        (x2 - width, y2 - height),
        (x1, y1 + height),
        (x1, y1 + 2 * height),
    ]
    best, best_cost = (0.0, 0.0, width, height), float("inf")
    for rank, (x, y) in enumerate(candidates):
        left = min(max(x, 0.0), max(canvas[0] - width, 0.0))
        top = min(max(y, 0.0), max(canvas[1] - height, 0.0))
        place = (left, top, left + width, top + height)
        # A label moved into the canvas lies on its box: no harm, but the next candidate may be better.
        cost = sum(overlap(place, other) for other in taken) + rank * 1e-3 * width * height
        if cost < best_cost:
            best, best_cost = place, cost
    return best


def overlap(a: Rectangle, b: Rectangle) -> float:
    """Area in common, in square pixels."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def class_colour(label: int) -> tuple[int, int, int]:
    """A colour for class ``label``, always the same."""
    hue = (0.02 + label * GOLDEN_ANGLE) % 1.0
    value = (0.95, 0.75, 0.85)[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def text_colour(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is easier to read on this colour (ITU-R BT.601 luma)."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


@lru_cache(maxsize=16)
def label_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, for its many scripts, from matplotlib's files; Pillow's own font without them."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)
