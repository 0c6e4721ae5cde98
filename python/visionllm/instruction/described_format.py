"""How a text tells the number of points, and whether it describes an output format that no rule reads.

Boxes need no format; polygons and keypoints need their number of points. ``output_format.py`` reads the
tuples themselves.
"""

from __future__ import annotations

import re

from .instruction import MAX_POINTS
from .wording import BOX_WORDS, Word

_POINT_WORDS = frozenset({"points", "keypoints", "vertices", "landmarks"})
_POINT_FILLERS = frozenset({"boundary", "contour", "outline", "polygon", "corner", "mask"})
# What a text has that tells how a tuple is written: what comes first, the class, and the place of the object.
_ORDER_WORDS = frozenset(
    "followed then first next after before sequence order ordered pair pairs plus together preceded begin "
    "begins start starts end ends last tuple tuples row rows column columns format comma commas "
    "separated".split()
)
_LABEL_WORDS = frozenset(
    "label labels class classes category categories name names kind type types index id number what which "
    "thing".split()
)
_PLACE_WORDS = frozenset(
    "corner corners left right top bottom upper lower edge edges side sides min max xmin xmax ymin ymax x y "
    "x1 x2 y1 y2 smallest largest coordinates extent axes position positions point points".split()
)
_NUMBER_WORDS = frozenset(
    "one three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty dozen".split()
)
_DOT_WORDS = frozenset(
    "dots nodes spots marks anchors positions pins samples corners sided sides gon places locations pegs "
    "knots edges points vertices stops flags pairs".split()
)
_SHAPES = re.compile(r"(?:tri|quadri|penta|hexa|hepta|octa|nona|deca|dodeca|icosa)(?:gons?|laterals?|gonal)")


def read_point_count(words: list[Word]) -> int | None:
    """N of "with 16 points" or "16 boundary points"; None when the words do not say."""
    for i, word in enumerate(words[1:]):
        before = words[i - 1] if i and words[i].text in _POINT_FILLERS else words[i]
        if word.text in _POINT_WORDS and before.text.isascii() and before.text.isdigit():
            return int(before.text) if len(before.text) < 6 else MAX_POINTS + 1
    return None


def unread_format_at(words: list[Word], range: int | None) -> int | None:
    """Where a text without readable format and number of points begins to describe one; None if it does not.

    Boxes need no description, so a text that asks for them has none to be read.

    Args:
        words: the words around the class set.
        range: the range that was read; this number is no number of points.
    """
    if any(word.text in BOX_WORDS for word in words):
        return None
    present = {word.text for word in words}
    ordered = bool(present & _LABEL_WORDS) and bool(present & _PLACE_WORDS)
    number = -4  # of the words, the last that is a number
    for i, word in enumerate(words):
        if (ordered and word.text in _ORDER_WORDS) or _SHAPES.fullmatch(word.text):
            return word.position
        if word.text in _DOT_WORDS and i - number <= 3:
            return words[number].position
        if word.text in _NUMBER_WORDS or (
            word.text.isdigit() and word.text not in ("0", "1", "2", str(range))
        ):
            number = i
    return None
