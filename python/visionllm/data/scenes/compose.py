"""Putting objects on a background: layout, pose, overlap, exact masks.

A layout is drawn before any artwork is looked at, so that two scenes of one layout in two drawing styles
have the same names at the same places. Objects are painted in order; `owner` says whose pixel each one is
in the end.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from visionllm.data.polygons import outline_of
from visionllm.data.scenes.appearance import BORDER, Appearance, cast_shadow, restyle

COUNT_CHANCE = np.array([0.08, 0.14, 0.2, 0.2, 0.15, 0.11, 0.07, 0.05])  # of 1..8 objects; 3.9 on average
# Training scenes hold more, 1 to 10 and 5.6 on average: a picture costs the same and teaches more.
DENSE_COUNT_CHANCE = np.array([0.03, 0.06, 0.1, 0.14, 0.16, 0.16, 0.14, 0.11, 0.06, 0.04])
SMALLEST, LARGEST = 0.12, 0.55  # longer side of an object, as a share of the picture's side; log-uniform
SOLID = 96 / 255  # alpha from which a pixel belongs to the object
MOST_CROWDED = 0.25  # part of a smaller object's square that a neighbour's square may cover
LEAST_VISIBLE = 0.5  # part of its pixels that every object keeps
LEAST_CONTRAST = 10.0  # of 255, mean difference between an object and what it covers; below, it is invisible
LEAST_PIXELS = 24  # visible pixels of the smallest object that counts
TRIES = 12


@dataclass(frozen=True)
class Placement:
    """Where one object goes, whatever it is."""

    x: float  # centre, share of the picture's side
    y: float
    side: float  # longer side before rotation, share of the picture's side
    angle: float  # radians, clockwise
    mirror: bool
    name: float  # 0..1, which class
    glyph: float  # 0..1, which look of the class
    repeat: bool  # of the same class as the object before


def layout(rng: np.random.Generator, count_chance: np.ndarray = COUNT_CHANCE) -> list[Placement]:
    """Random places for objects whose squares overlap little; those that find no room are left out.

    Args:
        count_chance: probabilities of 1, 2, … objects.
    """
    count = 1 + int(np.searchsorted(np.cumsum(count_chance), rng.random()).clip(0, len(count_chance) - 1))
    numbers = rng.random((count, 8))
    spots = rng.random((count, TRIES, 2))
    placed: list[Placement] = []
    for row, tries in zip(numbers, spots, strict=True):
        side = SMALLEST * (LARGEST / SMALLEST) ** row[0]
        angle = math.radians(50 * row[2] - 25 if row[1] < 0.92 else 360 * row[2])
        inset = 0.42 * side
        best = None
        for u, v in tries:
            x, y = inset + u * (1 - 2 * inset), inset + v * (1 - 2 * inset)
            crowd = max((_cover(x, y, side, other) for other in placed), default=0.0)
            if best is None or crowd < best[0]:
                best = (crowd, x, y)
            if crowd <= MOST_CROWDED / 2:
                break
        assert best is not None
        if best[0] <= MOST_CROWDED:
            placed.append(
                Placement(
                    best[1],
                    best[2],
                    side,
                    angle,
                    row[3] < 0.5,
                    row[4],
                    row[5],
                    row[6] < 0.12 and bool(placed),
                )
            )
    return placed


def _cover(x: float, y: float, side: float, other: Placement) -> float:
    """Intersection of two squares over the smaller one."""
    half = (side + other.side) / 2
    smaller = min(side, other.side)
    w = min(half - abs(x - other.x), smaller)
    h = min(half - abs(y - other.y), smaller)
    return w * h / smaller**2 if w > 0 and h > 0 else 0.0


def pose(picture: np.ndarray, side: float, angle: float, mirror: bool, stretch: float = 1.0) -> np.ndarray:
    """Scale a picture so that its longer side is `side` pixels, mirror and turn it.

    Args:
        picture: uint8 RGBA [h, w, 4].
        angle: radians, clockwise.
        stretch: width is multiplied and height divided by its square root, before the scaling.

    Returns:
        uint8 RGBA with `BORDER` transparent pixels on every side.
    """
    h, w = picture.shape[:2]
    scale = side / max(h / math.sqrt(stretch), w * math.sqrt(stretch))
    across, down = scale * math.sqrt(stretch), scale / math.sqrt(stretch)
    image = Image.fromarray(picture).convert("RGBa")
    if scale < 0.67:
        size = (max(1, round(w * across)), max(1, round(h * down)))
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        w, h, across, down = *size, 1.0, 1.0
    c, s = math.cos(angle), math.sin(angle)
    out_w = math.ceil(abs(w * across * c) + abs(h * down * s)) + 2 * BORDER
    out_h = math.ceil(abs(w * across * s) + abs(h * down * c)) + 2 * BORDER
    a, b, d, e = c / across, s / across, -s / down, c / down
    if mirror:
        a, b = -a, -b
    matrix = (
        a, b, w / 2 - a * out_w / 2 - b * out_h / 2,
        d, e, h / 2 - d * out_w / 2 - e * out_h / 2,
    )  # fmt: skip
    turned = image.transform((out_w, out_h), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(turned.convert("RGBA"))


@dataclass(frozen=True)
class Posed:
    """How a painted object was posed: what takes points of its picture to the canvas."""

    centre: tuple[float, float]  # x, y of its patch's centre on the canvas, pixels
    picture: tuple[int, int]  # height and width of its picture, pixels
    scale: tuple[float, float]  # across and down, canvas pixels per picture pixel
    angle: float  # radians, clockwise
    mirror: bool

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points [n, 2], picture pixels from the picture's centre, on the canvas: float64 [n, 2] pixels."""
        x, y = (points * self.scale).T
        if self.mirror:
            x = -x
        c, s = math.cos(self.angle), math.sin(self.angle)
        return np.stack([c * x - s * y, s * x + c * y], axis=1) + self.centre


class Canvas:
    """A picture being painted, and whose every pixel is.

    Attributes:
        picture: float32 [S, S, 3] in 0..255.
        owner: int8 [S, S], the object that a pixel belongs to, -1 for the background.
        kept: per object that was painted, the caller's key.
        posed: per object that `paint_posed` painted, how.
    """

    def __init__(self, background: np.ndarray):
        self.picture = background
        self.size = background.shape[0]
        self.owner = np.full((self.size, self.size), -1, np.int8)
        self.kept: list = []
        self.posed: list[Posed] = []
        self._whole: list[int] = []  # solid pixels of each object, were nothing in front of it
        self._visible: list[int] = []

    def _window(
        self, shape: tuple[int, int], left: int, top: int
    ) -> tuple[slice, slice, slice, slice] | None:
        h, w = shape
        x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + w, self.size), min(top + h, self.size)
        if x1 >= x2 or y1 >= y2:
            return None
        return slice(y1, y2), slice(x1, x2), slice(y1 - top, y2 - top), slice(x1 - left, x2 - left)

    def paint(
        self,
        rgb: np.ndarray,
        alpha: np.ndarray,
        x: float,
        y: float,
        key: object,
        shadow: np.random.Generator | None = None,
    ) -> bool:
        """Paint one object with its patch's centre at pixel (x, y); returns False, and paints nothing, if
        more than half of it would lie beyond the border, if it would hide more than half of an object
        behind it, or if it would hardly differ from what it covers.

        Args:
            rgb: float32 [h, w, 3] in 0..255; alpha: float32 [h, w] in 0..1.
            shadow: draws a cast shadow with these random numbers.
        """
        left, top = round(x - alpha.shape[1] / 2), round(y - alpha.shape[0] / 2)
        window = self._window(alpha.shape, left, top)
        if window is None:
            return False
        rows, columns, patch_rows, patch_columns = window
        opaque = alpha >= SOLID
        solid = opaque[patch_rows, patch_columns]
        inside = int(np.count_nonzero(solid))
        if inside < LEAST_PIXELS or inside < LEAST_VISIBLE * np.count_nonzero(opaque):
            return False
        region = self.picture[rows, columns]
        step = 1 + min(solid.shape) // 16  # a sample of the pixels is enough
        some = (slice(None, None, step), slice(None, None, step))
        difference = np.abs(rgb[patch_rows, patch_columns][some] - region[some])[solid[some]]
        if difference.size == 0 or difference.mean() < LEAST_CONTRAST:
            return False
        owner = self.owner[rows, columns]
        if self.kept:
            lost = np.bincount(owner[solid] + 1, minlength=len(self.kept) + 1)[1:]
            visible = np.array(self._visible) - lost
            if (visible < LEAST_VISIBLE * np.array(self._whole)).any() or (visible < LEAST_PIXELS).any():
                return False
            self._visible = visible.tolist()
        if shadow is not None:
            dark, right, down = cast_shadow(alpha, shadow)
            under = self._window(alpha.shape, left + right, top + down)
            if under is not None:
                self.picture[under[0], under[1]] *= 1 - dark[under[2], under[3]][..., None]
        region += alpha[patch_rows, patch_columns, None] * (rgb[patch_rows, patch_columns] - region)
        owner[solid] = len(self.kept)
        self.kept.append(key)
        self._whole.append(inside)
        self._visible.append(inside)
        return True

    def paint_posed(
        self,
        picture: np.ndarray,
        place: Placement,
        key: object,
        rng: np.random.Generator,
        look: Appearance,
        keep: bool,
    ) -> bool:
        """Pose, restyle and paint a picture (uint8 RGBA) at its place; `keep`: it keeps its colour."""
        stretch = math.exp(rng.uniform(-0.35, 0.35)) if rng.random() < look.stretch else 1.0
        patch = pose(picture, place.side * self.size, place.angle, place.mirror, stretch)
        rgb, alpha = restyle(patch, rng, look, keep)
        shadow = rng if rng.random() < look.shadow else None
        if not self.paint(rgb, alpha, place.x * self.size, place.y * self.size, key, shadow):
            return False
        h, w = picture.shape[:2]
        scale = place.side * self.size / max(h / math.sqrt(stretch), w * math.sqrt(stretch))
        centre = (
            round(place.x * self.size - alpha.shape[1] / 2) + alpha.shape[1] / 2,
            round(place.y * self.size - alpha.shape[0] / 2) + alpha.shape[0] / 2,
        )
        across, down = scale * math.sqrt(stretch), scale / math.sqrt(stretch)
        self.posed.append(Posed(centre, (h, w), (across, down), place.angle, place.mirror))
        return True

    def boxes(self) -> tuple[np.ndarray, np.ndarray]:
        """Boxes of the visible pixels, float32 [n, 4] x1, y1, x2, y2, and their number, float32 [n]."""
        boxes = np.zeros((len(self.kept), 4), np.float32)
        for k in range(len(self.kept)):
            mask = self.owner == k
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            boxes[k] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return boxes, np.array(self._visible, np.float32)

    def masks(self) -> list[np.ndarray]:
        """Per object the visible pixels, bool [S, S]."""
        return [self.owner == k for k in range(len(self.kept))]

    def outlines(self) -> list[np.ndarray | None]:
        """Per object the boundary of the largest part that is visible, float32 [P, 2]."""
        return [outline_of(mask, self.size, self.size)[0] for mask in self.masks()]

    def finish(self, rng: np.random.Generator, look: Appearance) -> np.ndarray:
        """Light, noise, blur and compression over the whole; uint8 RGB [S, S, 3]."""
        size, picture = self.size, self.picture
        chance = rng.random(4)
        if chance[0] < look.picture_light:
            across, down, gain = rng.uniform(-0.25, 0.25, 3).astype(np.float32)
            ramp = np.linspace(-1, 1, size, dtype=np.float32)
            light = 1 + gain + across * ramp + down * ramp[:, None]
            picture *= light[..., None]
        if chance[1] < look.picture_noise:
            noise = (rng.random((size, size), np.float32) - np.float32(0.5)) * np.float32(rng.uniform(7, 48))
            picture += noise[..., None]
        pixels = np.clip(picture, 0, 255, out=picture).astype(np.uint8)
        if chance[2] < look.picture_blur:
            blurred = Image.fromarray(pixels).filter(ImageFilter.BoxBlur(float(rng.uniform(0.3, 1.2))))
            pixels = np.array(blurred)
        if chance[3] < look.picture_jpeg:
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG", quality=int(rng.integers(25, 90)))
            with Image.open(stream) as image:
                pixels = np.array(image.convert("RGB"))
        return pixels
