"""Training views of annotated photos: crops, mosaics, mirror images, colour changes, from one generator.

A view is a square of ``image_size`` pixels (aspect ratio not kept). An object stays a target where its centre
is still in view, with its box clipped to the view (the IoU-sampling crop of SSD, Liu et al. 2016,
arXiv:1512.02325, keeps boxes the same way); where only a part of it remains, it becomes a crowd entry:
something is there, but nothing is asked of it. The mosaic of four views is YOLOv4's (Bochkovskiy et al. 2020,
arXiv:2004.10934).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from visionllm.data.photo_objects import LUMA, area_of, can_be_pasted, paste, recolour_parts
from visionllm.data.polygons import clip_outline
from visionllm.data.sample import Sample
from visionllm.image import fitted_size

MOST_PASTED = 3  # objects in a view


class SampleSource(Protocol):
    """Anything that hands over samples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class PhotoAugmentation:
    """How strongly photos are changed. Probabilities are per view, ranges are inclusive."""

    flip: float = 0.5  # mirrored left to right
    mosaic: float = 0.25  # four photos in one picture
    mosaic_split: tuple[float, float] = (0.35, 0.65)  # where the four meet, of the side
    whole: float = 0.25  # the whole photo, uncropped: as at inference
    on_object: float = 0.25  # crop around one object; the rest of the crops are anywhere
    object_scale: tuple[float, float] = (
        1.1,
        3.0,
    )  # side of a crop around an object, of the object's longer side
    crop_area: tuple[float, float] = (0.25, 1.0)  # of the photo
    crop_aspect: tuple[float, float] = (0.7, 1.43)  # width / height against the photo's own
    zoom_out: float = 0.1  # the crop shrunk onto a plain ground
    zoom_out_scale: tuple[float, float] = (0.4, 0.9)  # its side there, of the view
    brightness: float = 0.3  # factor 1 +- this
    contrast: float = 0.3
    saturation: float = 0.4
    hue: float = 0.05  # turns
    grey: float = 0.05  # no colour at all
    recolour: float = 0.0  # per object with an outline: a part of it takes another colour
    paste: float = 0.0  # objects of other photos, 1 to 3 of them, pasted into a view that is no mosaic
    paste_side: tuple[float, float] = (0.15, 0.85)  # such an object's longer side, of the view's; log-uniform
    min_side: float = 2.0  # pixels of the view; a smaller visible rest is no target
    max_cached_side: int = 512  # photos are kept in memory at this longest side
    balance: float = 0.5  # share of photos drawn by class (each class alike), the rest each photo alike


class AugmentedPhotos:
    """Random training views of the photos of a data set; each photo is decoded once and kept in memory.

    Args:
        photos: the data set.
        image_size: side S of a view in pixels.
        augmentation: how strongly the photos are changed.
        cache_bytes: photos beyond this much memory are decoded anew each time; the views are the same.
        longest_side: with it a view has its photo's shape, the shorter side image_size and the longer one at
            most this; mosaics are squares. 0: squares all.

    Raises:
        ValueError: the data set is empty.
    """

    def __init__(
        self,
        photos: SampleSource,
        image_size: int,
        augmentation: PhotoAugmentation | None = None,
        cache_bytes: int = 1 << 30,
        longest_side: int = 0,
    ) -> None:
        if len(photos) == 0:
            raise ValueError("photos: expected at least one, got an empty data set")
        self.photos = photos
        self.image_size = image_size
        self.augmentation = augmentation or PhotoAugmentation()
        self.cache_bytes = cache_bytes
        self.longest_side = longest_side
        self._cache: dict[int, Sample] = {}
        self._cached_bytes = 0
        self._by_class = _photos_by_class(photos)

    def draw(self, rng: np.random.Generator) -> Sample:
        """One view ``[S, S, 3]`` (with longest_side of another shape): a photo, or a mosaic of four with the
        vocabulary that they share.
        """
        size, settings = self.image_size, self.augmentation
        if rng.random() >= settings.mosaic:
            view = self.view(self._choose(rng), rng)
            if rng.random() < settings.paste:
                view = self._with_pasted(view, rng)
        else:
            split_x, split_y = (round(size * rng.uniform(*settings.mosaic_split)) for _ in range(2))
            corners = [(0, 0, split_x, split_y), (split_x, 0, size, split_y)]
            corners += [(0, split_y, split_x, size), (split_x, split_y, size, size)]
            views = [self.view(self._choose(rng), rng, x2 - x1, y2 - y1) for x1, y1, x2, y2 in corners]
            view = _mosaic(views, corners, size)
        return replace(view, image=jitter_colours(view.image, rng, settings))

    def photo(self, index: int) -> Sample:
        """Photo ``index`` at its cached size, without masks and words; its arrays are read-only."""
        sample = self._cache.get(index)
        if sample is None:
            sample = shrink(self.photos[index], self.augmentation.max_cached_side)
            # A view shows a part of the photo, or its mirror image: what was said of it need not hold.
            sample = replace(sample, masks=None, keypoints=None, expressions=[], captions={}, questions=[])
            for array in (sample.image, sample.boxes, sample.area, sample.iscrowd):
                array.flags.writeable = False
            if self._cached_bytes + sample.image.nbytes <= self.cache_bytes:
                self._cache[index] = sample
                self._cached_bytes += sample.image.nbytes
        return sample

    def view(self, index: int, rng: np.random.Generator, width: int = 0, height: int = 0) -> Sample:
        """A random view of photo ``index``, its colours but for `recolour` as they are; of this size, or of a
        whole view's.
        """
        photo = self._recoloured(self.photo(index), rng)
        if width == 0:
            height, width = view_size(photo, self.image_size, self.longest_side)
        window = choose_window(photo, rng, self.augmentation)
        view = crop(photo, window, width, height, rng, self.augmentation)
        return flip(view) if rng.random() < self.augmentation.flip else view

    def _recoloured(self, photo: Sample, rng: np.random.Generator) -> Sample:
        chance = self.augmentation.recolour
        if chance == 0:
            return photo
        return recolour_parts(photo, rng, chance, self.photo(int(rng.integers(len(self.photos)))).image)

    def _with_pasted(self, view: Sample, rng: np.random.Generator) -> Sample:
        for _ in range(1 + rng.integers(MOST_PASTED)):
            photo = self._recoloured(self.photo(self._choose(rng)), rng)
            places = [i for i in range(len(photo.boxes)) if can_be_pasted(photo, i)]
            if places:
                chosen = places[rng.integers(len(places))]
                side = math.exp(rng.uniform(*np.log(self.augmentation.paste_side)))
                view = paste(view, photo, chosen, side, rng)
        return view

    def _choose(self, rng: np.random.Generator) -> int:
        if self._by_class and rng.random() < self.augmentation.balance:
            members = self._by_class[rng.integers(len(self._by_class))]
            return int(members[rng.integers(len(members))])
        return int(rng.integers(len(self.photos)))


def view_size(sample: Sample, image_size: int, longest_side: int) -> tuple[int, int]:
    """Height and width of a picture as a network sees it (`visionllm.image.network_batch`)."""
    if longest_side == 0:
        return image_size, image_size
    return fitted_size(sample.image.shape[0], sample.image.shape[1], image_size, longest_side)


def choose_window(
    sample: Sample, rng: np.random.Generator, settings: PhotoAugmentation
) -> tuple[float, float, float, float]:
    """A random part of the picture, ``x1, y1, x2, y2`` in pixels within it."""
    height, width = sample.image.shape[:2]
    kind = rng.random()
    targets = np.flatnonzero(~sample.iscrowd)
    if kind < settings.whole:
        return 0.0, 0.0, float(width), float(height)
    if kind < settings.whole + settings.on_object and len(targets):
        x1, y1, x2, y2 = sample.boxes[targets[rng.integers(len(targets))]]
        side = max(x2 - x1, y2 - y1) * rng.uniform(*settings.object_scale)
        side = max(side, 0.15 * min(width, height))  # a crop of a few pixels shows nothing
        window_width, window_height = min(side, width), min(side, height)
        centre_x = (x1 + x2) / 2 + rng.uniform(-0.25, 0.25) * (window_width - (x2 - x1))
        centre_y = (y1 + y2) / 2 + rng.uniform(-0.25, 0.25) * (window_height - (y2 - y1))
        left = min(max(centre_x - window_width / 2, 0.0), width - window_width)
        top = min(max(centre_y - window_height / 2, 0.0), height - window_height)
    else:
        scale = math.sqrt(rng.uniform(*settings.crop_area))
        aspect = math.exp(rng.uniform(*np.log(settings.crop_aspect)))
        window_width = width * min(scale * math.sqrt(aspect), 1.0)
        window_height = height * min(scale / math.sqrt(aspect), 1.0)
        left, top = rng.uniform(0, width - window_width), rng.uniform(0, height - window_height)
    return float(left), float(top), float(left + window_width), float(top + window_height)


def crop(
    sample: Sample,
    window: tuple[float, float, float, float],
    width: int,
    height: int,
    rng: np.random.Generator,
    settings: PhotoAugmentation,
) -> Sample:
    """The part ``window``, resized to ``width`` x ``height``, at times smaller on a plain ground."""
    left, top = 0, 0
    inner_width, inner_height = width, height
    if rng.random() < settings.zoom_out:
        scale = rng.uniform(*settings.zoom_out_scale)
        inner_width, inner_height = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = int(rng.integers(width - inner_width + 1)), int(rng.integers(height - inner_height + 1))
    resized = Image.fromarray(sample.image).resize(
        (inner_width, inner_height), Image.Resampling.BILINEAR, box=window
    )
    if (inner_width, inner_height) == (width, height):
        image = np.asarray(resized)
    else:
        image = np.empty((height, width, 3), np.uint8)
        image[:] = rng.integers(0, 256, 3, dtype=np.uint8)
        image[top : top + inner_height, left : left + inner_width] = np.asarray(resized)

    x1, y1, x2, y2 = window
    scale_x, scale_y = inner_width / (x2 - x1), inner_height / (y2 - y1)
    full = (sample.boxes - np.array([x1, y1, x1, y1], np.float32)) * np.array(
        [scale_x, scale_y, scale_x, scale_y], np.float32
    )  # [n, 4] in the resized window, not yet clipped
    clipped = np.clip(full, 0, np.array([inner_width, inner_height] * 2, np.float32))
    centre = (full[:, :2] + full[:, 2:]) / 2
    inside = ((centre > 0) & (centre < np.array([inner_width, inner_height]))).all(1)
    side = np.min(clipped[:, 2:] - clipped[:, :2], axis=1, initial=np.inf)
    visible = side > 0.5  # below half a pixel nothing of it is in the picture
    keep = np.flatnonzero(visible)
    share = area_of(clipped[keep]) / np.maximum(area_of(full[keep]), 1e-6)
    return replace(
        sample,
        image=image,
        boxes=(clipped[keep] + np.array([left, top, left, top], np.float32)).astype(np.float32),
        names=[sample.names[i] for i in keep],
        area=(sample.area[keep] * scale_x * scale_y * share).astype(np.float32),
        iscrowd=sample.iscrowd[keep] | ~inside[keep] | (side[keep] < settings.min_side),
        masks=None,
        outlines=_moved(sample, keep, (x1, y1), (scale_x, scale_y), (inner_width, inner_height), (left, top)),
    )


def _moved(
    sample: Sample,
    keep: np.ndarray,
    origin: tuple[float, float],
    scale: tuple[float, float],
    size: tuple[int, int],
    place: tuple[int, int],
) -> list[np.ndarray | None] | None:
    """The kept objects' outlines in a part of the picture: from its origin, scaled, clipped, put in place."""
    if sample.outlines is None:
        return None
    moved: list[np.ndarray | None] = []
    for i in keep:
        outline = sample.outlines[i]
        if outline is not None:
            outline = clip_outline((outline - np.array(origin)) * np.array(scale), *size)
        moved.append(None if outline is None else (outline + np.array(place)).astype(np.float32))
    return moved


def flip(sample: Sample) -> Sample:
    """The mirror image, left and right exchanged."""
    boxes = sample.boxes.copy()
    boxes[:, [0, 2]] = sample.image.shape[1] - sample.boxes[:, [2, 0]]
    outlines = sample.outlines
    if outlines is not None:
        mirror = np.array([-1, 1], np.float32), np.array([sample.image.shape[1], 0], np.float32)
        outlines = [None if outline is None else outline * mirror[0] + mirror[1] for outline in outlines]
    image = np.ascontiguousarray(sample.image[:, ::-1])
    return replace(sample, image=image, boxes=boxes, masks=None, outlines=outlines)


def shrink(sample: Sample, max_side: int) -> Sample:
    """The sample with its longest side at most ``max_side`` pixels; without masks if that changes it."""
    height, width = sample.image.shape[:2]
    if max(height, width) <= max_side:
        return sample
    scale = max_side / max(height, width)
    return resize(sample, max(1, round(width * scale)), max(1, round(height * scale)))


def resize(sample: Sample, width: int, height: int) -> Sample:
    """The sample at another size, without masks; the sample itself if it has that size."""
    old_height, old_width = sample.image.shape[:2]
    if (old_width, old_height) == (width, height):
        return sample
    scale_x, scale_y = width / old_width, height / old_height
    resized = Image.fromarray(sample.image).resize((width, height), Image.Resampling.BILINEAR)
    return replace(
        sample,
        image=np.array(resized),
        boxes=sample.boxes * np.array([scale_x, scale_y, scale_x, scale_y], np.float32),
        area=(sample.area * (scale_x * scale_y)).astype(np.float32),
        masks=None,
        **_scaled_points(sample, scale_x, scale_y),
    )


def _scaled_points(sample: Sample, scale_x: float, scale_y: float) -> dict[str, Any]:
    """Outlines and keypoints of a picture of another size."""
    outlines, keypoints = sample.outlines, sample.keypoints
    if outlines is not None:
        scale = np.array([scale_x, scale_y], np.float32)
        outlines = [None if outline is None else outline * scale for outline in outlines]
    if keypoints is not None:
        keypoints = [
            {name: (x * scale_x, y * scale_y, v) for name, (x, y, v) in points.items()}
            for points in keypoints
        ]
    return {"outlines": outlines, "keypoints": keypoints}


def jitter_colours(image: np.ndarray, rng: np.random.Generator, settings: PhotoAugmentation) -> np.ndarray:
    """Random brightness, contrast, saturation and hue of uint8 ``[H, W, 3]``: one affine map of colours."""
    brightness = 1 + rng.uniform(-settings.brightness, settings.brightness)
    contrast = 1 + rng.uniform(-settings.contrast, settings.contrast)
    saturation = 1 + rng.uniform(-settings.saturation, settings.saturation)
    turn = 2 * math.pi * rng.uniform(-settings.hue, settings.hue)
    if rng.random() < settings.grey:
        saturation = 0.0
    matrix = _saturation(saturation) @ _hue_rotation(turn) * (brightness * contrast)  # [3, 3]
    mean = float(image[::8, ::8].mean()) * brightness
    offset = mean * (1 - contrast)
    rows = np.concatenate([matrix, np.full((3, 1), offset)], axis=1)  # [3, 4]
    return np.array(Image.fromarray(image).convert("RGB", tuple(rows.ravel().tolist())))


def _saturation(factor: float) -> np.ndarray:
    return factor * np.eye(3) + (1 - factor) * np.tile(LUMA, (3, 1))


def _hue_rotation(angle: float) -> np.ndarray:
    """Rotation of the chroma plane of YIQ by ``angle``; greys stay as they are."""
    to_yiq = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    rotation = np.eye(3)
    rotation[1:, 1:] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    return np.linalg.inv(to_yiq) @ rotation @ to_yiq


def _mosaic(views: Sequence[Sample], corners: Sequence[tuple[int, int, int, int]], size: int) -> Sample:
    image = np.empty((size, size, 3), np.uint8)
    for view, (x1, y1, x2, y2) in zip(views, corners, strict=True):
        image[y1:y2, x1:x2] = view.image
    shared = set(views[0].vocabulary).intersection(*(view.vocabulary for view in views[1:]))
    first = views[0].vocabulary
    return Sample(
        image=image,
        boxes=np.concatenate(
            [v.boxes + np.array(c[:2] * 2, np.float32) for v, c in zip(views, corners, strict=True)]
        ),
        names=[name for view in views for name in view.names],
        area=np.concatenate([view.area for view in views]),
        iscrowd=np.concatenate([view.iscrowd for view in views]),
        outlines=_placed_outlines(views, corners),
        image_id="+".join(str(view.image_id) for view in views),
        vocabulary=first if len(shared) == len(first) else tuple(name for name in first if name in shared),
    )


def _placed_outlines(
    views: Sequence[Sample], corners: Sequence[tuple[int, int, int, int]]
) -> list[np.ndarray | None] | None:
    """A mosaic's outlines; None where one of its parts has none."""
    placed: list[np.ndarray | None] = []
    for view, corner in zip(views, corners, strict=True):
        if view.outlines is None:
            return None
        shift = np.array(corner[:2], np.float32)
        placed += [None if outline is None else outline + shift for outline in view.outlines]
    return placed


def _photos_by_class(photos: SampleSource) -> list[np.ndarray]:
    """Per class, the photos that show it; empty where the data set cannot say without decoding."""
    objects, names = getattr(photos, "objects", None), getattr(photos, "category_names", None)
    if objects is None or names is None:
        return []
    members: dict[int, list[int]] = {}
    for index, entries in enumerate(objects):
        for category in {entry["category_id"] for entry in entries if not entry.get("iscrowd", 0)}:
            members.setdefault(category, []).append(index)
    return [np.array(members[category]) for category in sorted(members)]
