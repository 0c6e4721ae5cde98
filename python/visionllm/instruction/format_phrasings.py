"""Output formats described in words that no rule reads, with the formats that are meant.

Texts are composed: an opening that names picture and classes, a description of the tuple, and often a remark
on the numbers. ``format_phrasings.json`` has texts written by hand, for evaluation, in other words.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from .instruction import MAX_POLYGON_POINTS
from .render import format_text


class FormatPhrasing(NamedTuple):
    """A description and its format.

    Attributes:
        text: the instruction, with the placeholders ``<image>`` and ``<class>``.
        format: the output format that it means, ``(c, x1, y1, x2, y2)``.
        points: N of the format.
    """

    text: str
    format: str
    points: int


_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty")
_DOZENS = {6: "half a dozen", 12: "a dozen", 24: "two dozen", 36: "three dozen", 48: "four dozen"}
_SHAPES = {4: "quadrilateral", 5: "pentagon", 6: "hexagon", 8: "octagon", 10: "decagon", 12: "dodecagon"}

_OPENINGS = (
    "In <image>, find <class>.",
    "Look at <image> and find <class>.",
    "<image> Find all of <class>.",
    "The image is: <image>. Detect <class>.",
    "Here is <image>. I want <class>.",
    "Find <class> in <image>.",
    "Picture: <image>. Classes: <class>.",
    "Search <image> for <class>.",
    "For <image>, report everything in <class>.",
    "See <image>. Show me <class>.",
    "Given <image>, locate each object of <class>.",
    "Examine <image>. Consider only <class>.",
    "",
)
_ENDS = ("Objects: <class>. Image: <image>", "<class> <image>", "<image> <class>")  # without an opening
_CLOSINGS = (
    "",
    "",
    "",
    "Offsets within 512.",
    "The numbers are offsets.",
    "Use pixels.",
    "Please.",
    "Thank you.",
)
_BOX_OPENERS = (
    "For each one, give {tuple}.",
    "For every object, write {tuple}.",
    "Write {tuple} for each.",
    "Each object is {tuple}.",
    "I want {tuple}.",
    "Give me {tuple} for every object.",
    "Answer with {tuple}.",
    "One line per object: {tuple}.",
    "Output {tuple}.",
    "Tell me {tuple} of each.",
    "Return {tuple}, object by object.",
    "A row is {tuple}.",
)
_LABELS = (
    "the label", "its label", "the class", "its class", "the class index", "the category", "its category",
    "the name", "its name", "the class number", "the kind of object", "what it is", "the type", "its index",
)  # fmt: skip
_CORNERS = (
    "the top-left and bottom-right corner", "its top-left corner and its bottom-right corner",
    "the upper left and the lower right corner", "two opposite corners", "the corners top left, bottom right",
    "the left, top, right and bottom edges", "left, top, right, bottom", "xmin, ymin, xmax, ymax",
    "x and y of both corners", "its two corners", "the corner at the top left, then at the bottom right",
    "its smallest x and y and its largest x and y", "where it begins and where it ends in x and y",
    "x1 y1 x2 y2", "the four sides", "the left upper and right lower corner", "four numbers for its extent",
    "min x, min y, max x, max y", "the upper-left and the lower-right point", "start and end of both axes",
)  # fmt: skip
_BOX_TUPLES = (
    "{label} followed by {corners}", "{label}, then {corners}", "first {label} and then {corners}",
    "{label} first, {corners} after it", "a tuple of {label} and {corners}", "a row of {label} and {corners}",
    "{label} and next {corners}", "{label} before {corners}", "{label}, comma, {corners}",
    "{label} and {corners}, in this order", "{label} plus {corners}", "{label} together with {corners}",
    "a tuple that starts with {label} and ends with {corners}", "{label} and {corners}, separated by commas",
)  # fmt: skip
_MASK_SENTENCES = (
    "Trace each of them with {count} {dots}.",
    "Outline every one by {count} {dots}.",
    "Draw the contour of each as {count} {dots}.",
    "For each one, give the label followed by {count} {dots} along its boundary.",
    "First the class, then {count} {dots} around it.",
    "I want its silhouette made of {count} {dots}.",
    "Segment each with {count} {dots} on the border.",
    "The mask of each has {count} {dots}.",
    "Write the class, then {count} {dots} of its outline.",
    "Go around each object in {count} {dots}.",
    "Put {count} {dots} on the edge of each object.",
    "Its perimeter is given by {count} {dots}.",
    "Enclose each by a line through {count} {dots}.",
    "Each outline is to have {count} {dots}, clockwise.",
    "The class comes first, and {count} {dots} of the contour come next.",
    "Describe its boundary by {count} {dots}.",
    "Use {count} {dots} for each contour.",
    "Make a polygon of {count} {dots} for each.",
    "Cut each out by a polygon that has {count} {dots}.",
    "A tuple is the class and {count} {dots} on the mask.",
)
_DOTS = (
    "dots", "nodes", "spots", "marks", "corners", "positions", "anchors", "pins", "samples", "places",
    "coordinate pairs", "xy pairs", "locations", "stops", "knots", "boundary dots",
)  # fmt: skip
_WORD_DOTS = (*_DOTS, "points", "vertices", "boundary points", "points of the edge")
_SIDED_SENTENCES = (
    "Trace each of them as a {count}-sided polygon.",
    "Give each mask as a polygon with {count} sides.",
    "Outline every one by a shape of {count} edges.",
    "I want the contour as a {count}-gon.",
    "Its silhouette is a figure with {count} corners.",
    "Segment each into a closed line of {count} pieces.",
    "For each one, the label followed by the vertices of a {count}-sided outline.",
)
_SHAPE_SENTENCES = (
    "Trace each of them as a tight {shape}.",
    "Outline every one by a {shape}.",
    "Each mask is a {shape}.",
    "First the class, then the {shape} that encloses it.",
    "Enclose each in a {shape}.",
    "I want the contour as a {shape}.",
)
_PLAIN_POINTS = 16  # of polygons whose number of points is not said
_PLAIN_SENTENCES = (
    "Segment them.",
    "Segment each of them.",
    "Give me their masks.",
    "Outline every one.",
    "Trace their contours.",
    "I want the silhouette of each.",
    "For each one, give the label followed by its outline.",
    "Make a polygon for each.",
    "Draw the boundary of each.",
)
_POSE_SENTENCES = (
    "Give the pose of each by {count} {joints}.",
    "Report the label followed by {count} {joints} of its skeleton.",
    "Each pose has {count} {joints}.",
    "First the class, then the {count} {joints} of the skeleton.",
    "Find {count} landmark {joints} on each.",
    "The keypoints of each are {count} {joints}.",
)
_JOINTS = ("dots", "spots", "marks", "positions", "places", "xy pairs")


def number_words(number: int) -> str:
    """``"twenty-four"``; numbers from 0 to 69."""
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")


def format_phrasings(seed: int = 0) -> Iterator[FormatPhrasing]:
    """Compositions in an order that depends on the seed, each once, for as long as new ones are found.

    Boxes are two fifths of them; N of polygons is uniform from 4 to 64 where it is said, and 16 where it is
    not; N of poses is from 3 to 20.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    misses = 0
    while misses < 1000:
        sentence, points = _description(rng)
        text = f"{rng.choice(_OPENINGS)} {sentence} {rng.choice(_CLOSINGS)}"
        if "<class>" not in text:
            text = f"{text} {rng.choice(_ENDS)}"
        text = " ".join(text.split())
        misses = misses + 1 if text in seen else 0
        if text not in seen:
            seen.add(text)
            yield FormatPhrasing(text, format_text(points), points)


def training_phrasings(count: int = 6000, seed: int = 0) -> list[FormatPhrasing]:
    """The first ``count`` of :func:`format_phrasings`."""
    return list(islice(format_phrasings(seed), count))


@cache
def evaluation_phrasings() -> tuple[FormatPhrasing, ...]:
    """Those written by hand; never to be trained on."""
    path = Path(__file__).with_name("format_phrasings.json")
    pairs = json.loads(path.read_text(encoding="utf-8"))
    return tuple(FormatPhrasing(text, format_text(points), points) for text, points in pairs)


def _description(rng: random.Random) -> tuple[str, int]:
    """A sentence that describes a tuple, and its N."""
    kind = rng.random()
    if kind < 0.4:
        described = rng.choice(_BOX_TUPLES).format(label=rng.choice(_LABELS), corners=rng.choice(_CORNERS))
        return rng.choice(_BOX_OPENERS).format(tuple=described), 2
    if kind < 0.5:
        points = rng.randint(3, 20)
        count = rng.choice((str(points), number_words(points)))
        return rng.choice(_POSE_SENTENCES).format(count=count, joints=rng.choice(_JOINTS)), points
    if kind < 0.52:
        return rng.choice(_PLAIN_SENTENCES), _PLAIN_POINTS
    if kind < 0.56:
        points = rng.choice(list(_SHAPES))
        return rng.choice(_SHAPE_SENTENCES).format(shape=_SHAPES[points]), points
    points = rng.randint(4, MAX_POLYGON_POINTS)
    if kind < 0.65:
        count = rng.choice((str(points), number_words(points)))
        return rng.choice(_SIDED_SENTENCES).format(count=count), points
    # "16 points" is read by a rule; "sixteen points" is not.
    count, dots = str(points), rng.choice(_DOTS)
    if rng.random() < 0.5:
        count, dots = number_words(points), rng.choice(_WORD_DOTS)
    if points in _DOZENS and rng.random() < 0.5:
        count, dots = _DOZENS[points], rng.choice(_WORD_DOTS)
    return rng.choice(_MASK_SENTENCES).format(count=count, dots=dots), points
