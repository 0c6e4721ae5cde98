"""Captions of a scene in three lengths, several references each.

All lengths speak of the largest objects first. "short" names up to three groups of equal objects, "long" says
also where they are, "detailed" gives every object a sentence with its size, colour and place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from visionllm.data.expressions import YES, Thing, View
from visionllm.english import NUMBERS, is_or_are, listed, one, plural, several

GROUPS = {"short": 3, "long": 4}  # at most
DETAILED_OBJECTS = 6  # at most
LARGE, SMALL = (
    0.36,
    0.2,
)  # longer side of an object, share of the picture's side, from and up to which it is so called
MIDDLE = 1 / 6  # a centre within this of the picture's is in the middle; on both axes, thirds


@dataclass(frozen=True)
class _Group:
    """Objects of one class."""

    noun: str  # with its colour where the class is a coloured shape
    things: list[Thing]

    @property
    def count(self) -> int:
        return len(self.things)

    @property
    def text(self) -> str:
        return several(self.count, self.noun)


def captions_of(view: View, names: list[str], rng: np.random.Generator) -> dict[str, list[str]]:
    """References by length; the first one is the plainest.

    Args:
        names: the class names of the view's things.
    """
    if not view.things:
        return {}
    groups = _groups(view, names)
    return {
        "short": _short(groups),
        "long": _long(view, groups),
        "detailed": _detailed(view, names),
    }


def _groups(view: View, names: list[str]) -> list[_Group]:
    by_name: dict[str, list[Thing]] = {}
    for thing, name in zip(view.things, names, strict=True):
        by_name.setdefault(name, []).append(thing)
    groups = [_Group(name, things) for name, things in by_name.items()]
    return sorted(groups, key=lambda group: -sum(thing.area for thing in group.things))


def _short(groups: list[_Group]) -> list[str]:
    texts = [group.text for group in groups[: GROUPS["short"]]]
    first = groups[0]
    return list(
        dict.fromkeys(
            [
                listed(texts),
                f"a picture of {listed(texts)}",
                f"there {is_or_are(first.count, first.noun)} {listed(texts)}",
                f"a picture with {listed(texts)}",
                *([listed([texts[1], texts[0], *texts[2:]])] if len(texts) > 1 else []),
            ]
        )
    )


def place_of(thing: Thing) -> str:
    """Where an object is, in thirds of the picture: "at the top left", "in the middle"."""
    column = "left" if thing.x < 0.5 - MIDDLE else "right" if thing.x > 0.5 + MIDDLE else ""
    row = "top" if thing.y < 0.5 - MIDDLE else "bottom" if thing.y > 0.5 + MIDDLE else ""
    if row:
        return f"at the {row} {column}".rstrip()
    return f"on the {column}" if column else "in the middle"


def _long(view: View, groups: list[_Group]) -> list[str]:
    texts, spread = [], []
    for group in groups[: GROUPS["long"]]:
        places = {place_of(thing) for thing in group.things}
        texts.append(f"{group.text} {places.pop()}" if len(places) == 1 else group.text)
        spread.append(group.text)
    first = groups[0]
    references = [
        f"there {is_or_are(first.count, first.noun)} {listed(texts)}",
        listed(texts),
        f"the picture shows {listed(texts)}",
    ]
    if view.complete and len(groups) <= GROUPS["long"]:
        total = len(view.things)
        objects = f"{NUMBERS[total]} {'object' if total == 1 else plural('object')}"
        references.append(f"the picture shows {objects}: {listed(texts)}")
    return list(dict.fromkeys(references))


def _detailed(view: View, names: list[str]) -> list[str]:
    order = sorted(range(len(names)), key=lambda k: -view.things[k].area)
    shown = order[:DETAILED_OBJECTS]
    sentences = []
    for k in shown:
        thing = view.things[k]
        sentences.append(f"{_described(thing, names[k])} {is_or_are(1, thing.noun)} {place_of(thing)}.")
    extra = _relation_sentence(view, shown, names)
    total = len(names)
    if view.complete:
        opening = f"there {'is' if total == 1 else 'are'} {NUMBERS[total]} "
        opening += ("object" if total == 1 else plural("object")) + "."
    else:
        opening = f"this is a photo with {one(names[shown[0]], view.things[shown[0]].noun)}."
    versions = [[opening, *sentences, *extra], [*sentences, *extra], [opening, *sentences]]
    return list(dict.fromkeys(" ".join(version) for version in versions))


def size_word(thing: Thing) -> str:
    side = max(thing.width, thing.height)
    return "large" if side > LARGE else "small" if side < SMALL else ""


def _described(thing: Thing, name: str) -> str:
    colour = thing.colour if thing.colour and not name.startswith(thing.colour + " ") else ""
    return one(" ".join(word for word in (size_word(thing), colour, name) if word), thing.noun)


def _relation_sentence(view: View, shown: list[int], names: list[str]) -> list[str]:
    """Where the second largest object is from the largest, if their names are unique and it is clear."""
    if len(shown) < 2 or names.count(names[shown[0]]) > 1 or names.count(names[shown[1]]) > 1:
        return []
    first, second = view.things[shown[0]], view.things[shown[1]]
    for relation in ("left of", "right of", "above", "below"):
        if second.relates(relation, first) == YES and _mostly(relation, first, second):
            verb = is_or_are(1, second.noun)
            return [f"the {names[shown[1]]} {verb} {relation} the {names[shown[0]]}."]
    return []


def _mostly(relation: str, first: Thing, second: Thing) -> bool:
    across, down = abs(first.x - second.x), abs(first.y - second.y)
    return (across > down) == (relation in ("left of", "right of"))
