"""What a scene stands on: gradients, textures, and crops of photos.

A photo shows real things without boxes. So every photo says which names it shows for certain
(`Photo.shows`: never placed on it, never in the scene's vocabulary) and which it may show
(`Photo.may_show`: in the vocabulary only where such an object was placed).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image


def _photo_names() -> list[tuple[str, ...]]:
    text = resources.files("visionllm.data.scenes").joinpath("photo_names.txt").read_text(encoding="utf-8")
    sections = re.split(r"^\[.*\]$", text, flags=re.MULTILINE)[1:]
    return [tuple(" ".join(name.split()) for name in section.strip().split(",")) for section in sections]


COCO_NAMES, PHOTO_THINGS = _photo_names()


@dataclass(frozen=True)
class Photo:
    """A photo to crop backgrounds from."""

    path: str
    shows: frozenset[str]  # names of real things in it
    may_show: frozenset[str]  # names of things that could be in it


def photos_of(folder: str | Path, annotations: str | Path | None = None) -> list[Photo]:
    """The photos of a folder, in name order.

    Args:
        annotations: COCO-format JSON that annotates the folder's photos exhaustively for its categories.
            Without it each of COCO's names may be in any photo.
    """
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise FileNotFoundError(f"backgrounds: expected .jpg, .jpeg or .png files in {folder}, found none")
    doubtful = frozenset(PHOTO_THINGS) | frozenset(COCO_NAMES)
    if annotations is None:
        return [Photo(str(path), frozenset(), doubtful) for path in paths]
    data = json.loads(Path(annotations).read_text())
    category = {c["id"]: c["name"] for c in data["categories"]}
    doubtful -= frozenset(category.values())
    shown: dict[str, set[str]] = {image["file_name"]: set() for image in data["images"]}
    file_name = {image["id"]: image["file_name"] for image in data["images"]}
    for annotation in data["annotations"]:
        shown[file_name[annotation["image_id"]]].add(category[annotation["category_id"]])
    annotated = [path for path in paths if path.name in shown]
    return [Photo(str(path), frozenset(shown[path.name]), doubtful) for path in annotated]


# px; crops of 130 to 288 pixels are sharp enough behind a 224-pixel scene, and quick to scale
_PHOTO_SIDE = 288


@cache
def _photo(path: str) -> Image.Image:
    """A photo, its shorter side reduced to `_PHOTO_SIDE` pixels. Kept: a crop must not decode it again."""
    with Image.open(path) as image:
        image.draft("RGB", (_PHOTO_SIDE, _PHOTO_SIDE))
        picture = image.convert("RGB")
    scale = _PHOTO_SIDE / min(picture.size)
    if scale < 1:
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BOX
        )
    return picture


def photo_crop(photo: Photo, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random square part of a photo, sometimes mirrored, darkened or washed out.

    Returns:
        float32 [size, size, 3] in 0..255.
    """
    picture = _photo(photo.path)
    scale, u, v, mirror, wash, gain = rng.random(6)
    side = min(picture.size) * (0.45 + 0.55 * scale)
    x, y = u * (picture.width - side), v * (picture.height - side)
    resample = Image.Resampling.BILINEAR
    crop = np.asarray(picture.resize((size, size), resample, (x, y, x + side, y + side)), np.float32)
    if mirror < 0.5:
        crop = crop[:, ::-1]
    if wash < 0.3:
        keep = np.float32(0.45 + wash)
        crop = crop * keep + np.float32(255 * gain) * (1 - keep)
    return np.array(crop, np.float32)


@cache
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(size, dtype=np.float32) / size
    return axis[:, None], axis[None, :]


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A colour, float32 [3] in 0..255: any, or (more often) a pale or dark one of little saturation."""
    colour = rng.random(3)
    if rng.random() < 0.6:
        colour = colour.mean() + (colour - colour.mean()) * 0.35
    return (255 * colour).astype(np.float32)


def _smooth(values: np.ndarray, size: int) -> np.ndarray:
    """uint8 [g, g, 3] enlarged smoothly to float32 [size, size, 3]."""
    return np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC), np.float32)


def drawn(size: int, rng: np.random.Generator) -> np.ndarray:
    """A drawn background: plain, a gradient, blotches, stripes or a checker, with or without grain.

    Returns:
        float32 [size, size, 3] in 0..255.
    """
    y, x = _grid(size)
    first, second = _colour(rng), _colour(rng)
    kind, angle, frequency, phase, grain = rng.random(5)
    angle *= 2 * np.pi
    if kind < 0.12:
        picture = np.broadcast_to(first, (size, size, 3)).copy()
    elif kind < 0.45:  # linear gradient, drawn coarsely
        c, s = np.cos(angle), np.sin(angle)
        cy, cx = _grid(8)
        ramp = np.clip(0.5 + (cx - 0.44) * c + (cy - 0.44) * s, 0, 1)[..., None]
        picture = _smooth((first * (1 - ramp) + second * ramp).astype(np.uint8), size)
    elif kind < 0.65:  # blotches
        cells = int(3 + 10 * frequency)
        ramp = rng.random((cells, cells, 1), np.float32)
        picture = _smooth((first * (1 - ramp) + second * ramp).astype(np.uint8), size)
    elif kind < 0.75:  # blotches of any colour
        cells = int(2 + 5 * frequency)
        picture = _smooth(rng.integers(0, 256, (cells, cells, 3), np.uint8), size)
    else:  # stripes or checker at any angle
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        n = np.float32(3 + 17 * frequency)
        second = first + (second - first) * rng.uniform(0.15, 0.8)
        odd = ((c * x + s * y) * n + phase).astype(np.int32)
        if kind > 0.87:
            odd = odd + ((c * y - s * x) * n + 20 + phase).astype(np.int32)
        picture = np.stack([first, second]).astype(np.float32)[odd & 1]
    if grain < 0.3:
        amount = 8 + 60 * grain
        picture += (rng.random((size, size, 1), np.float32) - 0.5) * np.float32(2 * amount)
    return picture
