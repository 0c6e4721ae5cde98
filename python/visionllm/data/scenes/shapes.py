"""Plain shapes in plain colours ("red circle"): nameable objects that need no artwork at all.

A shape is an alpha mask drawn four times too large and averaged down; its colour is drawn from the range of
hues, saturations and brightnesses that its name allows.
"""

from __future__ import annotations

import colorsys
import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "arrow", "hexagon", "crescent")

# name: (hue from, hue to) in turns, (saturation from, to), (value from, to)
COLOURS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-0.02, 0.015), (0.75, 1.0), (0.65, 1.0)),
    "orange": ((0.065, 0.095), (0.8, 1.0), (0.9, 1.0)),
    "yellow": ((0.135, 0.165), (0.7, 1.0), (0.9, 1.0)),
    "green": ((0.28, 0.40), (0.6, 1.0), (0.4, 0.85)),
    "blue": ((0.57, 0.66), (0.65, 1.0), (0.55, 1.0)),
    "purple": ((0.74, 0.80), (0.5, 0.9), (0.45, 0.8)),
    "black": ((0.0, 1.0), (0.0, 0.1), (0.0, 0.12)),
    "white": ((0.0, 1.0), (0.0, 0.03), (0.94, 1.0)),
}

# Points of the shapes, clockwise from the top. Where a shape looks the same after a turn, the names follow
# its looks: the corner that is nearest to the top is the top one.
POINTS: dict[str, tuple[str, ...]] = {
    "square": ("top left corner", "top right corner", "bottom right corner", "bottom left corner"),
    "triangle": ("top corner", "right corner", "left corner"),
    "star": ("top tip", "right tip", "lower right tip", "lower left tip", "left tip"),
    "heart": ("bottom tip", "notch"),
    "cross": ("top end", "right end", "bottom end", "left end"),
    "arrow": ("tip", "tail"),
    "hexagon": (
        "top corner", "upper right corner", "lower right corner",
        "bottom corner", "lower left corner", "upper left corner",
    ),
    "crescent": ("upper tip", "lower tip"),
}  # fmt: skip
TURNS_INTO_ITSELF = ("square", "triangle", "star", "cross", "hexagon")  # as often as it has points

SHAPE_NAMES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)


def _points(shape: str) -> list[tuple[float, float]]:
    """Corners of a polygonal shape in -1..1."""

    def around(n: int, radius: float = 1.0, turn: float = -0.25) -> list[tuple[float, float]]:
        angles = [2 * math.pi * (i / n + turn) for i in range(n)]
        return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]

    if shape == "square":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    if shape == "triangle":
        return around(3)
    if shape == "hexagon":
        return around(6)
    if shape == "star":
        outer, inner = around(5), around(5, 0.42, -0.25 + 0.1)
        return [point for pair in zip(outer, inner, strict=True) for point in pair]
    if shape == "cross":
        w = 0.34
        quarter = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w)]
        return [*quarter, (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]
    if shape == "arrow":
        return [(-1, -0.28), (0.1, -0.28), (0.1, -0.75), (1, 0), (0.1, 0.75), (0.1, 0.28), (-1, 0.28)]
    if shape == "heart":
        ts = [2 * math.pi * i / 90 for i in range(90)]
        return [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
            )
            for t in ts
        ]
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")


@cache
def shape_points(shape: str) -> np.ndarray:
    """Where the `POINTS` of a shape are: float64 [n, 2] from the centre of its extent, in longer sides."""
    if shape == "crescent":  # where its two circles meet; its extent ends at these points
        horns = np.array([(0.561, 0.004), (0.9335, 0.749)])
        return horns - np.array([0.9335 / 2, (1 + 0.004) / 2])
    corners = np.array(_points(shape))
    low, high = corners.min(0), corners.max(0)
    if shape == "star":
        points = corners[::2]
    elif shape == "cross":
        points = np.array([(0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)])
    elif shape == "arrow":
        points = np.array([(1.0, 0.0), (-1.0, 0.0)])
    elif shape == "heart":
        points = np.array([corners[45], corners[0]])  # t = π and 0
    else:
        points = corners
    return (points - (low + high) / 2) / (high - low).max()


@cache
def shape_mask(shape: str, size: int) -> np.ndarray:
    """Alpha uint8 [h, w] of a shape, cropped to its extent; the longer side is `size` pixels."""
    over = 4 * size
    mask = Image.new("L", (over, over), 0)
    draw = ImageDraw.Draw(mask)
    full = (0, 0, over - 1, over - 1)
    if shape in ("circle", "ring", "crescent"):
        draw.ellipse(full, fill=255)
        if shape == "ring":
            draw.ellipse((over * 0.22, over * 0.22, over * 0.78, over * 0.78), fill=0)
        if shape == "crescent":
            draw.ellipse((over * 0.28, -over * 0.02, over * 1.12, over * 0.82), fill=0)
    else:
        points = np.array(_points(shape))
        low, high = points.min(0), points.max(0)
        points = (points - (low + high) / 2) / (high - low).max() + 0.5
        draw.polygon([tuple(p) for p in points * (over - 1)], fill=255)
    small = mask.reduce(4)
    box = small.point(lambda v: 255 if v >= 96 else 0).getbbox()
    return np.asarray(small.crop(box))


def shape_picture(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """RGBA uint8 [h, w, 4] of a named shape ("red circle"), in a shade that its name allows."""
    colour, _, shape = name.partition(" ")
    hue, saturation, value = COLOURS[colour]
    shade = colorsys.hsv_to_rgb(rng.uniform(*hue) % 1.0, rng.uniform(*saturation), rng.uniform(*value))
    mask = shape_mask(shape, size)
    picture = np.empty((*mask.shape, 4), np.uint8)
    picture[..., :3] = np.round(np.array(shade) * 255)
    picture[..., 3] = mask
    return picture
