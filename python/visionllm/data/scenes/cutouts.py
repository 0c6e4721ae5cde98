"""Real objects cut out of annotated photos, to be pasted into scenes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

LEAST_AREA = 32**2  # square pixels; smaller objects are mush when they are pasted
LARGEST_SIDE = 160  # pixels that are kept of the longer side
LEAST_FILL = 0.25  # of its box that the mask covers; below, an object is mostly hidden or in pieces


def load_cutouts(
    annotations: str | Path, images: str | Path, per_class: int = 40
) -> list[tuple[np.ndarray, str]]:
    """Cut the annotated objects out of COCO-format photos.

    Taken are objects that are no crowd, larger than `LEAST_AREA`, in one connected outline, inside the
    photo, and not thin against their box; the `per_class` largest of every category.

    Args:
        annotations: COCO-format JSON with polygons or RLE.
        images: folder of the photos.

    Returns:
        (RGBA uint8 [h, w, 4] cropped to the mask, name) pairs, by category and descending area.
    """
    from pycocotools import mask as coco_mask

    data = json.loads(Path(annotations).read_text())
    names = {category["id"]: category["name"] for category in data["categories"]}
    photos = {image["id"]: image for image in data["images"]}
    chosen: dict[int, list[dict]] = {}
    for annotation in sorted(data["annotations"], key=lambda a: -a["area"]):
        photo = photos[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        inside = x >= 2 and y >= 2 and x + w <= photo["width"] - 2 and y + h <= photo["height"] - 2
        outlines = annotation["segmentation"]
        whole = isinstance(outlines, dict) or len(outlines) == 1
        solid = annotation["area"] >= max(LEAST_AREA, LEAST_FILL * w * h)
        row = chosen.setdefault(annotation["category_id"], [])
        if inside and whole and solid and not annotation.get("iscrowd", 0) and len(row) < per_class:
            row.append(annotation)
    cutouts: list[tuple[int, float, np.ndarray]] = []
    by_photo: dict[int, list[dict]] = {}
    for rows in chosen.values():
        for annotation in rows:
            by_photo.setdefault(annotation["image_id"], []).append(annotation)
    for image_id, rows in by_photo.items():
        photo = photos[image_id]
        with Image.open(Path(images) / photo["file_name"]) as image:
            pixels = np.asarray(image.convert("RGB"))
        for annotation in rows:
            outlines = annotation["segmentation"]
            if isinstance(outlines, list):
                outlines = coco_mask.merge(coco_mask.frPyObjects(outlines, *pixels.shape[:2]))
            elif isinstance(outlines["counts"], list):
                outlines = coco_mask.frPyObjects(outlines, *pixels.shape[:2])
            cut = _cut(pixels, coco_mask.decode(outlines))
            if cut is not None:
                cutouts.append((annotation["category_id"], annotation["area"], cut))
    cutouts.sort(key=lambda entry: (entry[0], -entry[1]))
    return [(cut, names[category]) for category, _, cut in cutouts]


def _cut(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """RGBA of the masked part of uint8 [H, W, 3]: soft edge, longer side at most `LARGEST_SIDE`."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    alpha = Image.fromarray(mask[window] * 255).filter(ImageFilter.BoxBlur(1))
    picture = Image.fromarray(np.dstack([pixels[window], np.asarray(alpha)]))
    scale = LARGEST_SIDE / max(picture.size)
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    return np.array(picture)
