"""Changes of photos' objects in training: parts take other colours, objects go from one photo to another."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from visionllm.data.polygons import clip_outline
from visionllm.data.sample import Sample

LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601: what a grey version of R, G, B is
LEAST_PASTED_SIDE, LEAST_PASTED_AREA = 40, 900  # pixels and square pixels of an object in its own photo
MOST_CROWDED = 0.35  # of its box there that another box may cover
MOST_GROWN = 2.0  # times that its pixels grow
LEAST_SHOWN = 6  # pixels of its sides in the view
# Shares of a box that a pasted object covers: from the first on its outline is another, above the second
# nothing is asked of it, from the third on it is gone.
SOME_HIDDEN, MOST_HIDDEN, ALL_HIDDEN = 0.1, 0.5, 0.9


def can_be_pasted(photo: Sample, index: int) -> bool:
    """Whether an object has an outline, is large enough to be known again, wholly in the photo, and hardly
    behind others.
    """
    outline = None if photo.outlines is None else photo.outlines[index]
    if outline is None or photo.iscrowd[index]:
        return False
    height, width = photo.image.shape[:2]
    (x1, y1), (x2, y2) = outline.min(0), outline.max(0)
    corners = np.concatenate(
        [np.maximum(photo.boxes[:, :2], (x1, y1)), np.minimum(photo.boxes[:, 2:], (x2, y2))], 1
    )
    common = np.delete(area_of(corners) * (corners[:, 2:] > corners[:, :2]).all(1), index)
    if len(common) and common.max() > MOST_CROWDED * (x2 - x1) * (y2 - y1):
        return False
    whole = x1 > 1 and y1 > 1 and x2 < width - 2 and y2 < height - 2
    return bool(
        whole and max(x2 - x1, y2 - y1) >= LEAST_PASTED_SIDE and photo.area[index] >= LEAST_PASTED_AREA
    )


def paste(view: Sample, photo: Sample, index: int, side: float, rng: np.random.Generator) -> Sample:
    """The view with an object of a photo before it (simple copy-paste, Ghiasi et al. 2021, arXiv:2012.07177).

    What the object hides most of is not asked for any more, what it hides a part of has no outline.

    Args:
        index: of an object that `can_be_pasted`.
        side: its longer side there, of the view's; less where its pixels would have to grow much.
    """
    assert photo.outlines is not None
    outline = photo.outlines[index]
    assert outline is not None
    height, width = view.image.shape[:2]
    low = np.maximum(np.floor(outline.min(0)).astype(int), 0)
    high = np.minimum(np.ceil(outline.max(0)).astype(int) + 1, photo.image.shape[1::-1])
    scale = min(side * max(height, width) / (high - low).max(), MOST_GROWN)
    stretch = math.exp(rng.uniform(-0.2, 0.2))
    scales = np.array([scale * stretch, scale / stretch])
    size = np.maximum(np.round((high - low) * scales), 2).astype(int)
    patch = Image.fromarray(photo.image[low[1] : high[1], low[0] : high[0]])
    patch = patch.resize(tuple(size.tolist()), Image.Resampling.BILINEAR)
    shape = (outline - low) * (size / (high - low))  # [p, 2] in the patch
    mask = Image.new("L", patch.size)
    ImageDraw.Draw(mask).polygon([tuple(point) for point in shape.tolist()], fill=255)
    if rng.random() < 0.5:
        patch, mask = (one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for one in (patch, mask))
        shape = np.stack([size[0] - shape[:, 0], shape[:, 1]], 1)
    room = np.array([width, height]) - size
    least, most = np.minimum(room, 0) - 0.2 * size, np.maximum(room, 0) + 0.2 * size
    corner = np.round(rng.uniform(least, most)).astype(int)

    canvas = Image.fromarray(view.image)
    canvas.paste(patch, tuple(corner.tolist()), mask.filter(ImageFilter.BoxBlur(1)))
    inside = Image.new("L", (width, height))
    inside.paste(mask, tuple(corner.tolist()))
    hidden = np.asarray(inside) >= 128
    rows, columns = np.flatnonzero(hidden.any(1)), np.flatnonzero(hidden.any(0))
    if len(rows) < LEAST_SHOWN or len(columns) < LEAST_SHOWN:
        return view
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
    share = np.array([_share(hidden, one) for one in view.boxes])  # [n], of each box that is hidden
    keep = np.flatnonzero(share < ALL_HIDDEN) if len(share) else np.zeros(0, int)
    share = share[keep]
    outlines = None
    if view.outlines is not None:
        kept = [view.outlines[i] if part < SOME_HIDDEN else None for i, part in zip(keep, share, strict=True)]
        outlines = [*kept, clip_outline(shape + corner, width, height)]
    return replace(
        view,
        image=np.array(canvas),
        boxes=np.concatenate([view.boxes[keep], box[None]]),
        names=[*(view.names[i] for i in keep), photo.names[index]],
        area=np.append(view.area[keep], np.float32(np.count_nonzero(hidden))),
        iscrowd=np.append(view.iscrowd[keep] | (share > MOST_HIDDEN), False),
        outlines=outlines,
    )


def _share(mask: np.ndarray, box: np.ndarray) -> float:
    x1, y1, x2, y2 = (round(float(value)) for value in box)
    part = mask[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
    return float(part.mean()) if part.size else 0.0


def recolour_parts(
    sample: Sample, rng: np.random.Generator, chance: float, texture: np.ndarray | None = None
) -> Sample:
    """Objects of which one side of a random line takes one colour, light and shade kept, or shows another
    picture: few photos show few clothes, and a box that ends where unknown ones begin should not look right.

    Args:
        chance: per object that has an outline and is no crowd.
        texture: uint8 [H, W, 3], the other picture, for every second one; None: colours alone.
    """
    if sample.outlines is None:
        return sample
    image = None
    for outline, crowd in zip(sample.outlines, sample.iscrowd, strict=True):
        if outline is None or crowd or rng.random() >= chance:
            continue
        if image is None:
            image = sample.image.copy()
        angle, place = rng.uniform(0, 2 * math.pi), rng.uniform(0.2, 0.8)
        colour = rng.uniform(0, 255, 3)
        low = np.maximum(np.floor(outline.min(0)).astype(int), 0)
        high = np.minimum(np.ceil(outline.max(0)).astype(int) + 1, image.shape[1::-1])
        if (high <= low).any():
            continue
        canvas = Image.new("1", tuple((high - low).tolist()))
        ImageDraw.Draw(canvas).polygon([tuple(point) for point in (outline - low).tolist()], fill=1)
        rows, columns = np.nonzero(np.asarray(canvas))
        if len(rows) == 0:
            continue
        along = columns * math.cos(angle) + rows * math.sin(angle)
        chosen = along >= along.min() + place * (along.max() - along.min())
        rows, columns = rows[chosen] + low[1], columns[chosen] + low[0]
        if texture is not None and rng.random() < 0.5:
            x, y = (rng.uniform(0, 0.6) * side for side in texture.shape[1::-1])
            window = (x, y, x + 0.4 * texture.shape[1], y + 0.4 * texture.shape[0])
            other = Image.fromarray(texture).resize(canvas.size, Image.Resampling.BILINEAR, box=window)
            image[rows, columns] = np.asarray(other)[rows - low[1], columns - low[0]]
            continue
        light = image[rows, columns] @ LUMA
        shade = 0.35 + 0.65 * light / max(float(light.mean()), 1.0)
        image[rows, columns] = np.clip(shade[:, None] * colour, 0, 255).astype(np.uint8)
    return sample if image is None else replace(sample, image=image)


def area_of(boxes: np.ndarray) -> np.ndarray:
    """Of corner boxes [n, 4]."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
