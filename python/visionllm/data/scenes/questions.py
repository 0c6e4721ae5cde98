"""Questions about a scene with short answers, balanced: an answer is drawn first where there is a choice.

count: "3"; colour: "red"; position: "left", "top right"; yes_no; comparison: "yes" or a noun of the question.
Nothing is asked whose answer is too close to call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from visionllm.data.expressions import (
    NO,
    RELATIONS,
    SIDES,
    UNSURE,
    YES,
    Phrase,
    View,
    absent_like,
    larger,
    pick,
)
from visionllm.data.sample import QUESTION_KINDS, Question
from visionllm.english import MASS, PLURAL, is_or_are, one, plural

PER_KIND = 2  # questions of each kind, where a scene has so many
TRIES = 4
RARE_COUNTS = 0.35  # chance of the answers 0 and 1, which any scene offers, against the higher counts
# Distances from the picture's middle up to which a centre is in the middle, and from which it is not.
MIDDLE, OUTSIDE = 0.12, 0.17
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}

Pair = tuple[str, str]  # question and answer


@dataclass(frozen=True)
class _Draw:
    """What is random about one question."""

    rng: np.random.Generator
    style: float  # 0..1, which wording
    answer: bool  # of a question that is answered with yes or no

    def worded(self, wordings: Sequence[str]) -> str:
        return wordings[int(self.style * len(wordings))]

    @property
    def said(self) -> str:
        return "yes" if self.answer else "no"


def questions_of(view: View, rng: np.random.Generator) -> list[Question]:
    """Up to `PER_KIND` different questions of each kind."""
    if not view.things:
        return []
    makers: dict[str, Callable[[View, _Draw], Pair | None]] = {
        "count": _count,
        "colour": _colour,
        "position": _position,
        "yes_no": _yes_no,
        "comparison": _comparison,
    }
    questions: list[Question] = []
    for kind in QUESTION_KINDS:
        made: dict[str, str] = {}
        style = rng.random()  # one wording for all of a kind: what is asked twice then reads the same
        yes_first = rng.random() < 0.5
        for number in range(PER_KIND):  # as many "yes" as "no"
            draw = _Draw(rng, style, yes_first != bool(number % 2))
            for _ in range(TRIES):
                pair = makers[kind](view, draw)
                if pair is not None and pair[0] not in made:
                    made[pair[0]] = pair[1]
                    break
        questions += [Question(text, answer, kind) for text, answer in made.items()]
    return questions


def _choose(rng: np.random.Generator, options: Sequence[Phrase]) -> Phrase:
    return options[int(rng.random() * len(options))]


def _countable(phrase: Phrase) -> bool:
    return phrase.text not in PLURAL and phrase.text not in MASS


def _count(view: View, draw: _Draw) -> Pair | None:
    rng = draw.rng
    phrases = [phrase for phrase in view.nouns if _countable(phrase)]
    for colour in dict.fromkeys(thing.colour for thing in view.things if thing.colour):
        phrases += [view.coloured(colour, head) for head in view.heads if _countable(head)]
    if view.complete:
        phrases.append(view.everything)
    if view.absent:
        phrases.append(view.called(str(pick(rng, view.absent))))
    by_answer: dict[int, list[Phrase]] = {}
    for phrase in phrases:
        if phrase.is_clear and _countable(phrase):
            by_answer.setdefault(len(phrase.found), []).append(phrase)
    if not by_answer:
        return None
    answers = list(by_answer)
    weights = np.array([RARE_COUNTS if answer < 2 else 1.0 for answer in answers]).cumsum()
    answer = answers[int(np.searchsorted(weights, rng.random() * weights[-1], "right"))]
    things = plural(_choose(rng, by_answer[answer]).text)
    wordings = (
        "how many {} are there?",
        "how many {} do you see?",
        "how many {} are in the picture?",
        "what is the number of {}?",
    )
    return draw.worded(wordings).format(things), str(answer)


def _colour(view: View, draw: _Draw) -> Pair | None:
    """Of something that its noun, or its place among all objects, tells apart without its colour."""
    rng = draw.rng
    targets: dict[str, list[str]] = {}
    for phrase in view.nouns:
        k = phrase.only
        if k is not None and (colour := view.things[k].colour):
            targets.setdefault(colour, []).append(phrase.text)
    if view.complete:
        for side, words in SIDES.items():
            placed = view.on(side, view.everything, f"object {words}")
            if placed.only is not None and (colour := view.things[placed.only].colour):
                targets.setdefault(colour, []).append(placed.text)
    if not targets:
        return None
    colour = str(pick(rng, list(targets)))
    thing = str(pick(rng, targets[colour]))
    verb = "are" if thing in PLURAL else "is"
    wordings = [f"what {word} {verb} the {thing}?" for word in ("colour", "color")]
    wordings += [f"what is the {word} of the {thing}?" for word in ("colour", "color")]
    return draw.worded(wordings), colour


def _target(view: View, rng: np.random.Generator) -> tuple[int, str] | None:
    """A thing with a name of its own."""
    if not view.named:
        return None
    k = int(pick(rng, list(view.named)))  # type: ignore[call-overload]
    return k, view.named[k].text


def _verb(text: str) -> str:
    return is_or_are(1, text)


def _position(view: View, draw: _Draw) -> Pair | None:
    rng = draw.rng
    target = _target(view, rng)
    if target is None:
        return None
    k, name = target
    thing, form = view.things[k], rng.random()
    if form < 0.4:
        column = _third(thing.x, "left", "right")
        row = _third(thing.y, "top", "bottom")
        if column is None or row is None:
            return None
        answer = " ".join(word for word in (row, column) if word) or "middle"
        verb = _verb(name)
        wordings = (f"where {verb} the {name}?", f"in which part of the picture {verb} the {name}?")
        return draw.worded(wordings), answer
    if form < 0.7:
        sides = [("left", "right"), ("top", "bottom")][int(rng.random() * 2)]
        words = ("on the left or on the right", "at the top or at the bottom")[sides[0] == "top"]
        place = thing.is_on(sides[0])
        if place == UNSURE:
            return None
        return f"{_verb(name)} the {name} {words}?", sides[0] if place == YES else sides[1]
    other = _target(view, rng)
    if other is None or other[0] == k:
        return None
    first, second = [("left of", "right of"), ("above", "below")][int(rng.random() * 2)]
    relation = thing.relates(first, view.things[other[0]])
    if relation == UNSURE:
        return None
    answer = (first if relation == YES else second).removesuffix(" of")
    return f"{_verb(name)} the {name} {first.removesuffix(' of')} or {second} the {other[1]}?", answer


def _third(value: float, low: str, high: str) -> str | None:
    """Which third of the picture, "" for the middle one, or None where it is not clear."""
    distance = abs(value - 0.5)
    if distance < MIDDLE:
        return ""
    return None if distance < OUTSIDE else low if value < 0.5 else high


def _yes_no(view: View, draw: _Draw) -> Pair | None:
    """Every form can have both answers."""
    rng, answer, form = draw.rng, draw.answer, draw.rng.random()
    target = _target(view, rng)
    if form < 0.4 or target is None:
        return _exists(view, draw)
    k, name = target
    thing = view.things[k]
    if form < 0.6:
        if thing.colour is None or name.startswith(thing.colour + " "):
            nouns = [p for p in view.nouns if p.only is not None and view.things[p.only].colour]
            if not nouns:
                return None
            phrase = _choose(rng, nouns)
            assert phrase.only is not None
            thing, name = view.things[phrase.only], phrase.text
        colour = thing.colour if answer else str(pick(rng, view.colours))
        if colour is None or (thing.has_colour(colour) != (YES if answer else NO)):
            return None
        return f"{_verb(name)} the {name} {colour}?", draw.said
    if form < 0.8:
        side = str(pick(rng, list(SIDES)))
        place = thing.is_on(side)
        if place == UNSURE:
            return None
        side = side if (place == YES) == answer else OPPOSITE[side]
        return f"{_verb(name)} the {name} {SIDES[side]}?", draw.said
    other = _target(view, rng)
    if other is None or other[0] == k:
        return None
    for relation in (("left of", "right of"), ("above", "below"))[int(rng.random() * 2)]:
        if thing.relates(relation, view.things[other[0]]) == (YES if answer else NO):
            words = pick(rng, RELATIONS[relation][2])
            return f"{_verb(name)} the {name} {words} the {other[1]}?", draw.said
    return None


def _exists(view: View, draw: _Draw) -> Pair | None:
    """What is asked for in vain is of the same kind as what is there, so that the words give nothing away."""
    rng = draw.rng
    options: list[tuple[str | None, Phrase]] = [(None, phrase) for phrase in view.nouns]
    for head in view.heads:
        colours = dict.fromkeys(view.things[k].colour for k in head.found)
        options += [(colour, head) for colour in colours if colour]
    if not options:
        return None
    colour, head = options[int(rng.random() * len(options))]
    if not draw.answer:
        other = absent_like(view, colour, head, rng)
        if other is None:
            return None
        colour, noun = other
    else:
        noun = head.text
    text = f"{colour} {noun}" if colour else noun
    verb = "are" if noun in PLURAL else "is"
    what = one(text, noun)
    wordings = (f"{verb} there {what}?", f"{verb} there {what} in the picture?", f"do you see {what}?")
    return draw.worded(wordings), draw.said


def _comparison(view: View, draw: _Draw) -> Pair | None:
    rng, answer, form = draw.rng, draw.answer, draw.rng.random()
    if form < 0.3:
        return _more(view, draw)
    first, second = _target(view, rng), _target(view, rng)
    if first is None or second is None or first[0] == second[0]:
        return None
    (j, a), (k, b) = first, second
    if form < 0.8:
        is_larger = larger(view.things[j], view.things[k])
        if is_larger == UNSURE:
            return None
        word, opposite = ("larger", "smaller") if rng.random() < 0.5 else ("smaller", "larger")
        holds = (is_larger == YES) == (word == "larger")
        if form < 0.55:
            word = word if holds == answer else opposite
            return f"{_verb(a)} the {a} {word} than the {b}?", draw.said
        return f"which is {word}, the {a} or the {b}?", a if holds else b
    relation, words = [("left of", "further left"), ("above", "higher")][int(rng.random() * 2)]
    holds_ = view.things[j].relates(relation, view.things[k])
    if holds_ == UNSURE:
        return None
    return f"which is {words}, the {a} or the {b}?", a if holds_ == YES else b


def _more(view: View, draw: _Draw) -> Pair | None:
    """Whether there are more of one noun than of another, or of one colour than of another."""
    rng = draw.rng
    phrases = [phrase for phrase in view.nouns if _countable(phrase)]
    if view.complete and rng.random() < 0.5:
        colours = dict.fromkeys(thing.colour for thing in view.things if thing.colour)
        phrases = [p for colour in colours if (p := view.coloured(colour, view.everything)).is_clear]
    pairs = [(p, q) for p in phrases for q in phrases if len(p.found) > len(q.found)]
    if not pairs:
        return None
    more, fewer = pairs[int(rng.random() * len(pairs))]
    first, second = (more, fewer) if draw.answer else (fewer, more)
    return f"are there more {plural(first.text)} than {plural(second.text)}?", draw.said
