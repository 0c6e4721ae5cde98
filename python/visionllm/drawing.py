"""A result drawn into its picture: one colour a class, labels that keep out of each other's way."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from visionllm.drawing_text import (
    Colour,
    Line,
    label_font,
    shortened,
    with_legend_below,
    with_lines_below,
)

if TYPE_CHECKING:
    from visionllm.boxes import Boxes
    from visionllm.result import Result

Rectangle = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels

GOLDEN_ANGLE = 0.381966  # share of the hue circle; neighbouring classes get colours far apart
FILL = 80  # opacity of a polygon's inside, of 255


def draw_result(result: Result, scale: float = 1.0, spread: bool = False) -> Image.Image:
    """A copy of the picture with what was found; words, and what is absent, stand below it.

    Args:
        result: of any task.
        scale: enlargement of the picture.
        spread: also a cross over every point, whose arms are its coordinates' standard deviations.

    Returns:
        RGB; as large as the enlarged picture, and higher where there are lines below it.
    """
    if result.task == "segmentation":
        canvas = draw_polygons(result.image, result.boxes, scale, spread)
    elif result.task == "keypoints":
        canvas = draw_keypoints(result.image, result.boxes, scale, spread)
        return with_legend_below(canvas, _point_legend(result))
    else:
        canvas = draw_boxes(result.image, result.boxes, scale, spread)
    return with_lines_below(canvas, _lines_below(result))


def _point_legend(result: Result) -> list[Line]:
    names = result.instruction.keypoints if len(result) else ()
    return [Line(name, dot=class_colour(number)) for number, name in enumerate(names)]


def _lines_below(result: Result) -> list[Line]:
    if result.error is not None:
        return [Line(f"no answer: {result.error}")]
    if result.task == "vqa":
        return [Line(str(result.instruction.question), quiet=True), Line(str(result.text))]
    if result.text is not None:
        return [Line(result.text)]
    lines = []
    for label, found in enumerate(result.expressions or []):
        if found.box is not None:
            lines.append(Line(f"{found.text}  {found.box.score:.2f}", dot=class_colour(label)))
        else:
            score = "" if found.absent is None else f"  {found.absent:.2f}"
            lines.append(Line(f"{found.text}: not in the picture{score}", quiet=True))
    return lines


def draw_boxes(image: np.ndarray, boxes: Boxes, scale: float = 1.0, spread: bool = False) -> Image.Image:
    """A copy of the picture with every box, its class name and its score.

    Args:
        image: uint8 RGB ``[H, W, 3]``.
        boxes: in pixels of ``image``; the best is drawn last, on top.
        scale: enlargement of the picture; line width and letters follow the size of the enlarged picture.
        spread: also crosses of the standard deviations, as in `draw_result`.
    """
    canvas = _enlarged_picture(image, scale)
    draw = ImageDraw.Draw(canvas, "RGBA")
    for box in reversed(list(boxes)):
        draw.rectangle(_enlarged(box.xyxy, scale), outline=class_colour(box.label), width=line_width(canvas))
    if spread:
        _draw_spread(canvas, boxes, scale)
    _draw_labels(canvas, boxes, scale)
    return canvas


def draw_polygons(image: np.ndarray, boxes: Boxes, scale: float = 1.0, spread: bool = False) -> Image.Image:
    """A copy of the picture with every polygon, outlined and tinted, its class name and its score.

    Args: as `draw_boxes`; ``boxes.points`` are the polygons.
    """
    canvas = _enlarged_picture(image, scale)
    draw = ImageDraw.Draw(canvas, "RGBA")
    width = line_width(canvas)
    for index in reversed(range(len(boxes))):
        corners = _enlarged_points(boxes, index, scale)
        colour = class_colour(int(boxes.labels[index]))
        draw.polygon(corners, fill=(*colour, FILL))
        draw.line([*corners, corners[0], corners[1]], fill=colour, width=width, joint="curve")
        for x, y in corners:
            draw.ellipse((x - width, y - width, x + width, y + width), fill=(*colour, 255))
    if spread:
        _draw_spread(canvas, boxes, scale)
    _draw_labels(canvas, boxes, scale)
    return canvas


def draw_keypoints(image: np.ndarray, boxes: Boxes, scale: float = 1.0, spread: bool = False) -> Image.Image:
    """A copy of the picture with every object's points: full where visible, rings where hidden.

    Points that are not in the picture (COCO's v = 0) are left out; each of an object's points has a colour of
    its own, and a thin line in the class's colour goes around the object.

    Args: as `draw_boxes`; ``boxes.points`` are the keypoints.
    """
    canvas = _enlarged_picture(image, scale)
    draw = ImageDraw.Draw(canvas, "RGBA")
    width = line_width(canvas)
    found = boxes.keypoints()
    for index in reversed(range(len(boxes))):
        rectangle = _enlarged(boxes.box(index).xyxy, scale)
        draw.rectangle(rectangle, outline=(*class_colour(int(boxes.labels[index])), 150), width=1)
    for index in reversed(range(len(boxes) if found is not None else 0)):
        assert found is not None
        for number, ((x, y), flag) in enumerate(
            zip(_enlarged_points(boxes, index, scale), found[index, :, 2], strict=True)
        ):
            if flag == 0:
                continue
            colour, radius = class_colour(number), 2.2 * width
            place = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(place, fill=(*colour, 255) if flag == 2 else None, outline=(255, 255, 255), width=1)
            if flag == 1:
                draw.ellipse(place, outline=colour, width=width)
    if spread:
        _draw_spread(canvas, boxes, scale)
    _draw_labels(canvas, boxes, scale)
    return canvas


def _draw_spread(canvas: Image.Image, boxes: Boxes, scale: float) -> None:
    """Crosses over the points: arms of one standard deviation to each side."""
    if boxes.spread is None:
        return
    draw = ImageDraw.Draw(canvas, "RGBA")
    points = boxes.xyxy.reshape(len(boxes), 2, 2) if boxes.points is None else boxes.points
    for places, arms in zip(points * scale, boxes.spread * scale, strict=True):
        for (x, y), (across, down) in zip(places.tolist(), arms.tolist(), strict=True):
            for line in ((x - across, y, x + across, y), (x, y - down, x, y + down)):
                draw.line(line, fill=(0, 0, 0, 200), width=3)
                draw.line(line, fill=(255, 255, 255, 255), width=1)


def _draw_labels(canvas: Image.Image, boxes: Boxes, scale: float) -> None:
    """Class names and scores, the best object's first, which gets the best place."""
    draw = ImageDraw.Draw(canvas, "RGBA")
    line = line_width(canvas)
    font = label_font(canvas.size)
    taken: list[Rectangle] = []
    for box in boxes:
        name = shortened(box.name, font, 0.6 * canvas.width)
        text = f"{name} {box.score:.2f}"
        left, top, right, bottom = font.getbbox(text)
        width, height = right - left + 2 * line, bottom - top + 2 * line
        place = place_label(_enlarged(box.xyxy, scale), (width, height), canvas.size, taken)
        taken.append(place)
        colour = class_colour(box.label)
        draw.rectangle(place, fill=(*colour, 225))
        draw.text((place[0] + line - left, place[1] + line - top), text, fill=text_colour(colour), font=font)


def line_width(canvas: Image.Image) -> int:
    """Of outlines, in pixels."""
    return max(2, round(min(canvas.size) / 220))


def _enlarged_picture(image: np.ndarray, scale: float) -> Image.Image:
    canvas = Image.fromarray(image)
    if scale == 1.0:
        return canvas
    size = (max(round(canvas.width * scale), 1), max(round(canvas.height * scale), 1))
    return canvas.resize(size, Image.Resampling.LANCZOS)


def _enlarged(xyxy: Rectangle, scale: float) -> Rectangle:
    x1, y1, x2, y2 = (value * scale for value in xyxy)
    return x1, y1, max(x1, x2), max(y1, y2)


def _enlarged_points(boxes: Boxes, index: int, scale: float) -> list[tuple[float, float]]:
    assert boxes.points is not None, "these boxes have points"
    return [(float(x), float(y)) for x, y in boxes.points[index] * scale]


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


def class_colour(label: int) -> Colour:
    """A colour for class ``label``, always the same."""
    hue = (0.02 + label * GOLDEN_ANGLE) % 1.0
    value = (0.95, 0.75, 0.85)[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def text_colour(background: Colour) -> Colour:
    """Black or white, whichever is easier to read on this colour (ITU-R BT.601 luma)."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)
