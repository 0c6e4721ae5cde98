"""What can be said about a scene: referring expressions, captions, questions with answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from visionllm.data.expressions import Thing, View, expressions_of
from visionllm.data.sample import Expression, Question
from visionllm.data.scenes.captions import captions_of
from visionllm.data.scenes.colours import COLOUR_NAMES, clear_colour
from visionllm.data.scenes.questions import questions_of
from visionllm.data.scenes.shapes import COLOURS, SHAPE_NAMES, SHAPES

EXPRESSIONS = 8  # a scene at most

_SHAPE_NAMES = frozenset(SHAPE_NAMES)
# Glyphs that look like one of the shapes.
_LIKE_SHAPES: dict[str, frozenset[str]] = {
    "glowing star": frozenset({"star"}),
    "broken heart": frozenset({"heart"}),
    "bow and arrow": frozenset({"arrow"}),
    "bandage": frozenset({"cross"}),
    **dict.fromkeys(("bullseye", "life buoy", "donut"), frozenset({"ring", "circle"})),
    **dict.fromkeys(
        (
            "basketball", "baseball", "billiard ball", "soccer ball", "volleyball", "frisbee", "globe",
            "yarn", "cookie", "balloon", "medal", "bowling", "sun", "planet", "crystal ball",
        ),
        frozenset({"circle"}),
    ),
    **dict.fromkeys(("dinner plate", "dvd", "coin"), frozenset({"circle", "ring"})),
    **dict.fromkeys(("die", "gift", "picture frame", "window", "calendar", "waffle"), frozenset({"square"})),
}  # fmt: skip


def view_of(
    image: np.ndarray,
    owner: np.ndarray,
    names: Sequence[str],
    boxes: np.ndarray,
    area: np.ndarray,
    vocabulary: Sequence[str],
    doubtful: Collection[str] | None,
    related: Mapping[str, Collection[str]],
) -> View:
    """A scene as language sees it.

    Args:
        image: the finished picture, uint8 RGB [S, S, 3].
        owner: [S, S], the object that a pixel belongs to.
        boxes, area: float32 [n, 4] and [n] in pixels.
        vocabulary: names annotated exhaustively.
        doubtful: names that the photo behind the scene may show; None without a photo.
        related: names that an object of a class may be called besides its own.
    """
    size = float(image.shape[0])
    things = []
    for k, (name, box) in enumerate(zip(names, boxes, strict=True)):
        x1, y1, x2, y2 = (int(v) for v in box)
        colour, _, shape = name.partition(" ")
        if name in _SHAPE_NAMES:
            nouns, may_be, may_have = (shape,), frozenset[str](), frozenset({colour})
        else:
            pixels = image[y1:y2, x1:x2][owner[y1:y2, x1:x2] == k]
            clear, may_have = clear_colour(pixels)
            nouns, colour = (name,), clear or ""
            may_be = _LIKE_SHAPES.get(name, frozenset()) | frozenset(related.get(name, ()))
        things.append(
            Thing(
                nouns,
                (x1 + x2) / (2 * size),
                (y1 + y2) / (2 * size),
                (x2 - x1) / size,
                (y2 - y1) / size,
                float(area[k]) / size**2,
                may_be,
                colour or None,
                may_have,
            )
        )
    present = set(names) | {noun for thing in things for noun in (*thing.nouns, *thing.may_be)}
    return View(
        things,
        complete=doubtful is None,
        doubtful=frozenset(doubtful or ()),
        absent=[name for name in vocabulary if name not in present],
        colours=COLOUR_NAMES if any(name not in _SHAPE_NAMES for name in names) else tuple(COLOURS),
        shapes=SHAPES,
    )


def language_of(
    view: View, names: Sequence[str], rng: np.random.Generator
) -> tuple[list[Expression], dict[str, list[str]], list[Question]]:
    """Expressions, captions by length, and questions of a scene; ``names`` are its objects' classes."""
    return (
        expressions_of(view, rng, EXPRESSIONS),
        captions_of(view, list(names), rng),
        questions_of(view, rng),
    )
