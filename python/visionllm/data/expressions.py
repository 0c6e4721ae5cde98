"""Referring expressions of annotated pictures: unique by construction, or certain to fit nothing.

Every statement about an object ("red", "on the left", "above the cat") is three-valued: it holds, it does
not, or it is too close to call. An expression refers to an object only if it holds for that one and certainly
for no other; it is absent only if it certainly holds for none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from visionllm.data.sample import Expression, Sample

YES, UNSURE, NO = 1, 0, -1

SIDE_CLEAR = 0.06  # shares of the picture from its middle within which "left" or "right" is not clear
ORDER_CLEAR = 0.07  # shares of the picture by which two centres must differ to be called left of, above, …
SIZE_CLEAR = 1.4  # ratio of areas from which one object is the larger one
NEAR_CLEAR = 1.3  # ratio of distances from which one object is the nearer one

# How a present expression is made, and how often where several ways are possible.
KINDS = {"category": 0.3, "colour": 0.2, "position": 0.25, "size": 0.15, "relation": 0.1}
ABSENT_SHARE = 0.25

EXTREMES: dict[str, tuple[str, float, tuple[str, ...]]] = {  # side: axis, sign, adjectives
    "left": ("x", -1, ("leftmost",)),
    "right": ("x", 1, ("rightmost",)),
    "top": ("y", -1, ("topmost", "highest")),
    "bottom": ("y", 1, ("lowest",)),
}
SIDES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
CORNERS = ("top left", "top right", "bottom left", "bottom right")
RELATIONS: dict[str, tuple[str, float, tuple[str, ...]]] = {  # name: axis, sign, wordings
    "left of": ("x", -1, ("left of", "to the left of")),
    "right of": ("x", 1, ("right of", "to the right of")),
    "above": ("y", -1, ("above", "over")),
    "below": ("y", 1, ("below", "under")),
}
SIZES = {"largest": ("largest", "biggest"), "smallest": ("smallest",)}


@dataclass(frozen=True)
class Thing:
    """One object as language sees it; lengths are shares of the picture's sides, areas of its area."""

    nouns: tuple[str, ...]  # what it is called; the first is the usual noun, without a colour
    x: float  # centre of its box
    y: float
    width: float
    height: float
    area: float  # of its visible pixels
    may_be: frozenset[str] = frozenset()  # nouns that somebody could use for it
    colour: str | None = None  # where clear
    may_colours: frozenset[str] = frozenset()  # colours that somebody could call it; with `colour`

    @property
    def noun(self) -> str:
        return self.nouns[0]

    def is_called(self, noun: str) -> int:
        return YES if noun in self.nouns else UNSURE if noun in self.may_be else NO

    def has_colour(self, colour: str) -> int:
        return YES if colour == self.colour else UNSURE if colour in self.may_colours else NO

    def is_on(self, side: str) -> int:
        """Whether its centre is on a side ("left") or in a quarter ("top left") of the picture."""
        return min(_beyond(self._signed(part), SIDE_CLEAR) for part in side.split(" "))

    def _signed(self, side: str) -> float:
        axis, sign, _ = EXTREMES[side]
        return sign * (getattr(self, axis) - 0.5)

    def relates(self, relation: str, other: Thing) -> int:
        axis, sign, _ = RELATIONS[relation]
        return _beyond(sign * (getattr(self, axis) - getattr(other, axis)), ORDER_CLEAR)

    def distance(self, other: Thing) -> float:
        return float(np.hypot(self.x - other.x, self.y - other.y))


def _beyond(value: float, clear: float) -> int:
    return YES if value > clear else NO if value < -clear else UNSURE


def larger(first: Thing, second: Thing) -> int:
    """Whether the first is the larger one, by its visible area and by its box."""
    areas = first.area / max(second.area, 1e-9)
    boxes = first.width * first.height / max(second.width * second.height, 1e-9)
    if min(areas, boxes) > SIZE_CLEAR:
        return YES
    return NO if max(areas, boxes) < 1 / SIZE_CLEAR else UNSURE


@dataclass(frozen=True)
class Phrase:
    """A noun phrase without article ("red circle") and what it fits."""

    text: str
    fits: tuple[int, ...]  # YES, UNSURE or NO for each thing

    @property
    def is_clear(self) -> bool:
        return UNSURE not in self.fits

    @property
    def found(self) -> list[int]:
        return [k for k, fit in enumerate(self.fits) if fit == YES]

    @property
    def only(self) -> int | None:
        """The one thing that it fits, if it is clear and there is only one."""
        found = self.found
        return found[0] if self.is_clear and len(found) == 1 else None

    @property
    def fits_nothing(self) -> bool:
        return all(fit == NO for fit in self.fits)

    def but(self, text: str, test: Callable[[int], int]) -> Phrase:
        """The phrase with one more condition, a test of a thing's number."""
        return Phrase(text, tuple(min(fit, test(k)) if fit != NO else NO for k, fit in enumerate(self.fits)))


@dataclass(frozen=True)
class View:
    """A picture as language sees it.

    Attributes:
        things: its objects.
        complete: the picture holds no other objects, so that "the largest object" has a meaning.
        doubtful: nouns that also something without a box could have.
        absent: nouns of nothing in the picture, for certain.
        colours: colour names that may be asked for; empty where colours are not known.
        shapes: nouns to put a colour before, to say what is not there ("blue circle").
    """

    things: Sequence[Thing]
    complete: bool
    doubtful: frozenset[str] = frozenset()
    absent: Sequence[str] = ()
    colours: Sequence[str] = ()
    shapes: Sequence[str] = field(default=())

    @cached_property
    def everything(self) -> Phrase:
        return Phrase("object", (YES,) * len(self.things))

    def called(self, noun: str) -> Phrase:
        if noun in self.doubtful:
            return Phrase(noun, (UNSURE,) * len(self.things))
        return Phrase(noun, tuple(thing.is_called(noun) for thing in self.things))

    def coloured(self, colour: str, phrase: Phrase) -> Phrase:
        text = f"{colour} {phrase.text}"
        return phrase.but(text, lambda k: self.things[k].has_colour(colour))

    def on(self, side: str, phrase: Phrase, text: str) -> Phrase:
        """A phrase of what is on a side, or in a quarter ("top left"), of the picture."""
        return phrase.but(text, lambda k: self.things[k].is_on(side))

    def relating(self, relation: str, anchor: int, phrase: Phrase, text: str) -> Phrase:
        """A phrase of what has a relation to the thing ``anchor``."""
        other = self.things[anchor]
        return phrase.but(text, lambda k: NO if k == anchor else self.things[k].relates(relation, other))

    @cached_property
    def nouns(self) -> list[Phrase]:
        """The phrases of one noun that fit something and are clear."""
        nouns = dict.fromkeys(noun for thing in self.things for noun in thing.nouns)
        return [phrase for noun in nouns if (phrase := self.called(noun)).is_clear]

    @cached_property
    def named(self) -> dict[int, Phrase]:
        """For the things that a noun alone, or with a colour, tells from all others: the shortest phrase."""
        named: dict[int, Phrase] = {}
        for phrase in self.nouns:
            if phrase.only is not None:
                named.setdefault(phrase.only, phrase)
        for phrase in self.nouns:
            for k in phrase.found:
                colour = self.things[k].colour
                if k not in named and colour and (full := self.coloured(colour, phrase)).only == k:
                    named[k] = full
        return named

    @cached_property
    def heads(self) -> list[Phrase]:
        """What superlatives and places are said of: the nouns, and all objects where they are all known."""
        return [self.everything, *self.nouns] if self.complete else self.nouns


def pick(rng: np.random.Generator, options: Sequence) -> object:
    return options[int(rng.random() * len(options))]


def expressions_of(view: View, rng: np.random.Generator, count: int) -> list[Expression]:
    """Up to ``count`` different expressions, about a quarter of them absent."""
    found: dict[str, Expression] = {}
    for _ in range(2 * count):
        if len(found) == count or not view.things:
            break
        text: str | None
        objects: tuple[int, ...] = ()
        if rng.random() < ABSENT_SHARE:
            text = _absent(view, rng)
        else:
            text, objects = _present(view, rng)
        if text is not None:
            text = _article(text, rng)
            found.setdefault(text, Expression(text, objects))
    return list(found.values())


def _article(text: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.2:
        return text
    return "the " + (text.replace("object", "thing", 1) if rng.random() < 0.3 else text)


def _present(view: View, rng: np.random.Generator) -> tuple[str | None, tuple[int, ...]]:
    """An expression for some object; each kind is tried in a random order that follows its weight."""
    weights = np.array(list(KINDS.values()))
    order = np.argsort(rng.exponential(size=len(weights)) / weights)
    makers = {
        "category": _by_category, "colour": _by_colour, "position": _by_position,
        "size": _by_size, "relation": _by_relation,
    }  # fmt: skip
    for i in order:
        options = makers[list(KINDS)[i]](view, rng)
        if options:
            text, k = options[int(rng.random() * len(options))]
            return text, (k,)
    return None, ()


Options = list[tuple[str, int]]  # text and the thing that it refers to


def _only(phrases: Sequence[Phrase]) -> Options:
    return [(phrase.text, phrase.only) for phrase in phrases if phrase.only is not None]


def _by_category(view: View, rng: np.random.Generator) -> Options:
    return _only(view.nouns)


def _by_colour(view: View, rng: np.random.Generator) -> Options:
    colours = dict.fromkeys(thing.colour for thing in view.things if thing.colour)
    return _only([view.coloured(colour, head) for colour in colours for head in view.heads])


def _by_position(view: View, rng: np.random.Generator) -> Options:
    heads = view.heads
    for i in rng.permutation(len(heads)):
        options: Options = []
        for side, words in SIDES.items():
            options += _only([view.on(side, heads[i], f"{heads[i].text} {words}")])
            options += _extreme(view, heads[i], side, rng)
        for corner in CORNERS:
            text = f"{heads[i].text} {pick(rng, ('at', 'in'))} the {corner}"
            options += _only([view.on(corner, heads[i], text)])
        if options:
            return options
    return []


def _extreme(view: View, head: Phrase, side: str, rng: np.random.Generator) -> Options:
    axis, sign, words = EXTREMES[side]
    found = sorted(head.found, key=lambda k: -sign * getattr(view.things[k], axis))
    if len(found) < 2:
        return []
    first, second = (getattr(view.things[k], axis) for k in found[:2])
    return [(f"{pick(rng, words)} {head.text}", found[0])] if sign * (first - second) > ORDER_CLEAR else []


def _by_size(view: View, rng: np.random.Generator) -> Options:
    options: Options = []
    for head in view.heads:
        found = sorted(head.found, key=lambda k: view.things[k].area)
        if len(found) < 2:
            continue
        for word, k in (("smallest", found[0]), ("largest", found[-1])):
            pairs = ((j, k) if word == "smallest" else (k, j) for j in found if j != k)
            if all(larger(view.things[a], view.things[b]) == YES for a, b in pairs):
                options.append((f"{pick(rng, SIZES[word])} {head.text}", k))
    return options


def _by_relation(view: View, rng: np.random.Generator) -> Options:
    if not view.named or len(view.things) < 2:
        return []
    anchor = list(view.named)[int(rng.random() * len(view.named))]
    other, name = view.things[anchor], view.named[anchor].text
    options: Options = []
    for head in view.heads:
        if head.found == [anchor]:
            continue
        for relation, (_, _, wordings) in RELATIONS.items():
            text = f"{head.text} {pick(rng, wordings)} the {name}"
            options += _only([view.relating(relation, anchor, head, text)])
        near = sorted((view.things[k].distance(other), k) for k in head.found if k != anchor)
        if len(near) > 1 and near[1][0] > NEAR_CLEAR * near[0][0]:
            options.append((f"{head.text} {pick(rng, ('closest to', 'nearest to'))} the {name}", near[0][1]))
    return options


def _absent(view: View, rng: np.random.Generator) -> str | None:
    """An expression that fits nothing; None if the way that was drawn is not possible."""
    if not view.nouns:
        return _any(view.absent, rng)
    kind = rng.random()
    head = view.nouns[int(rng.random() * len(view.nouns))]
    if kind < 0.4:
        return absent_noun(view, head.text, rng)
    if kind < 0.65 and view.colours:
        colour = view.things[head.found[0]].colour
        if view.complete and rng.random() < 0.3:
            head = view.everything
        pair = absent_like(view, colour, head, rng) if colour else None
        return f"{pair[0]} {pair[1]}" if pair else None
    options: list[Phrase]
    if kind < 0.85 or not view.named:
        places = list(SIDES.items()) + [(corner, f"at the {corner}") for corner in CORNERS]
        options = [view.on(side, head, f"{head.text} {words}") for side, words in places]
    else:
        anchor = list(view.named)[int(rng.random() * len(view.named))]
        if head.found == [anchor]:
            return None
        options = [
            view.relating(
                relation, anchor, head, f"{head.text} {pick(rng, wordings)} the {view.named[anchor].text}"
            )
            for relation, (_, _, wordings) in RELATIONS.items()
        ]
    options = [phrase for phrase in options if phrase.fits_nothing]
    return str(pick(rng, options).text) if options else None  # type: ignore[attr-defined]


def absent_noun(view: View, like: str, rng: np.random.Generator) -> str | None:
    """A noun of nothing in the picture: a plain shape where ``like`` is one."""
    if like in view.shapes:
        return _any([shape for shape in view.shapes if view.called(shape).fits_nothing], rng)
    return _any(view.absent, rng)


def absent_like(
    view: View, colour: str | None, head: Phrase, rng: np.random.Generator
) -> tuple[str | None, str] | None:
    """A colour (or None) and a noun that fit nothing, made from some that do: one of the two is changed."""
    if colour is None:
        noun = absent_noun(view, head.text, rng)
        return None if noun is None else (None, noun)
    if head.text in view.shapes and rng.random() < 0.5:
        nouns = [shape for shape in view.shapes if view.coloured(colour, view.called(shape)).fits_nothing]
        noun = _any(nouns, rng)
        return None if noun is None else (colour, noun)
    other = _any([other for other in view.colours if view.coloured(other, head).fits_nothing], rng)
    return None if other is None else (other, head.text)


def _any(options: Sequence[str], rng: np.random.Generator) -> str | None:
    return options[int(rng.random() * len(options))] if options else None


def derived_expressions(sample: Sample, rng: np.random.Generator, count: int = 8) -> list[Expression]:
    """Expressions for any annotated picture: the only one of its category, the largest, the leftmost, …

    Colours are not said, and nothing is said about all objects, since annotations cover only their own
    categories. Categories with a crowd, and names outside the sample's vocabulary, are not spoken of.
    """
    height, width = sample.image.shape[:2]
    boxes = sample.boxes / np.array([width, height, width, height], np.float32)
    numbers = [k for k in range(len(sample.names)) if not sample.iscrowd[k]]
    things = [
        Thing(
            nouns=(sample.names[k],),
            x=float(boxes[k, 0] + boxes[k, 2]) / 2,
            y=float(boxes[k, 1] + boxes[k, 3]) / 2,
            width=float(boxes[k, 2] - boxes[k, 0]),
            height=float(boxes[k, 3] - boxes[k, 1]),
            area=float(sample.area[k]) / (width * height),
        )
        for k in numbers
    ]
    known = frozenset(sample.vocabulary)
    doubtful = {name for name, crowd in zip(sample.names, sample.iscrowd, strict=True) if crowd}
    doubtful |= set(sample.names) - known
    present = frozenset(sample.names)
    view = View(
        things, False, frozenset(doubtful), [name for name in sample.vocabulary if name not in present]
    )
    made = expressions_of(view, rng, count)
    return [Expression(e.text, tuple(numbers[k] for k in e.objects)) for e in made]
