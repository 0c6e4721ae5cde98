"""Referring expressions: unique or certainly absent, in generated scenes and derived from annotations.

`Reader` reads an expression by plain rules, without margins and without the code under test.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest

from visionllm.data.expressions import (
    NO,
    UNSURE,
    YES,
    Thing,
    View,
    derived_expressions,
    expressions_of,
    larger,
)
from visionllm.data.sample import Sample
from visionllm.data.scenes import SceneDataset

RELATION = r"(.+?) (?:(?:to the )?(left|right) of|(above|over|below|under)|(closest|nearest) to) the (.+)"
KINDS = r"\w+most|largest|smallest|closest| of |above|below| on | at "
AXES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1), "above": (1, -1), "below": (1, 1)}
SYNONYMS = {"over": "above", "under": "below"}


@dataclass
class Reader:
    """Finds what an expression refers to, from names and boxes alone."""

    names: list[str]
    boxes: np.ndarray  # [n, 4] in pixels
    area: np.ndarray
    size: float

    def read(self, text: str) -> list[int]:
        text = text.removeprefix("the ").replace("thing", "object")
        relation = re.fullmatch(
            r"(.+?) (?:(?:to the )?(left|right) of|(above|over|below|under)|(closest|nearest) to) the (.+)",
            text,
        )
        if relation:
            head, side, vertical, near, anchor = relation.groups()
            (other,) = self.read(anchor)
            found = [k for k in self.read(head) if k != other]
            if near:
                distance = np.hypot(*(self.centres - self.centres[other]).T)
                return [min(found, key=lambda k: distance[k])]
            axis, sign = AXES[side or SYNONYMS.get(vertical, vertical)]
            return [k for k in found if sign * (self.centres[k] - self.centres[other])[axis] > 0]
        place = re.fullmatch(r"(.+) (?:on|at|in) the ((?:top|bottom|left|right)(?: left| right)?)", text)
        if place:
            found = self.read(place[1])
            for word in place[2].split():
                axis, sign = AXES[word]
                found = [k for k in found if sign * (self.centres[k][axis] - self.size / 2) > 0]
            return found
        extreme = re.fullmatch(r"(\w+most|highest|lowest|largest|biggest|smallest) (.+)", text)
        if extreme:
            found = self.read(extreme[2])
            assert len(found) > 1
            if extreme[1] in ("largest", "biggest", "smallest"):
                sign = -1 if extreme[1] == "smallest" else 1
                return [max(found, key=lambda k: sign * self.area[k])]
            axis, sign = AXES[
                {"highest": "top", "lowest": "bottom"}.get(extreme[1], extreme[1].removesuffix("most"))
            ]
            return [max(found, key=lambda k: sign * self.centres[k][axis])]
        return [k for k, name in enumerate(self.names) if self.fits(text, name)]

    @property
    def centres(self) -> np.ndarray:
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2

    @staticmethod
    def fits(text: str, name: str) -> bool:
        colour, _, noun = name.partition(" ")
        return text in (name, noun, "object", f"{colour} object")


def reader_of(sample: Sample) -> Reader:
    return Reader(sample.names, sample.boxes, sample.area, sample.image.shape[0])


def thing(noun: str, x: float, y: float, side: float = 0.2, **more: object) -> Thing:
    return Thing((noun,), x, y, side, side, side**2, **more)  # type: ignore[arg-type]


def test_expressions_of_scenes_mean_what_they_say() -> None:
    dataset = SceneDataset("train", seed=11, size=128, language=True)
    kinds, absent, total = set(), 0, 0
    for index in range(150):
        sample = dataset[index]
        reader = reader_of(sample)
        for expression in sample.expressions:
            assert reader.read(expression.text) == list(expression.objects), (sample.names, expression)
            assert len(expression.objects) <= 1
            total, absent = total + 1, absent + (not expression.objects)
            kinds |= set(
                re.findall(r"\w+most|largest|smallest|closest| of |above|below| on | at ", expression.text)
            )
        assert len({expression.text for expression in sample.expressions}) == len(sample.expressions)
    assert total > 150 * 5 and 0.15 < absent / total < 0.35
    assert {"leftmost", "largest", "smallest", "closest", " of ", "above", " on ", " at "} <= kinds


def test_three_values() -> None:
    left, near, right = thing("dog", 0.3, 0.5), thing("dog", 0.33, 0.5), thing("dog", 0.8, 0.5)
    assert (left.relates("left of", right), right.relates("left of", left)) == (YES, NO)
    assert left.relates("left of", near) == near.relates("left of", left) == UNSURE
    assert (left.is_on("left"), right.is_on("left"), left.is_on("top")) == (YES, NO, UNSURE)
    assert left.is_on("top left") == UNSURE and right.is_on("top left") == NO
    small, large = thing("dog", 0, 0, 0.1), thing("dog", 0, 0, 0.3)
    assert (larger(large, small), larger(small, large), larger(left, right)) == (YES, NO, UNSURE)
    brown = thing("dog", 0, 0, colour="brown", may_colours=frozenset({"brown", "orange"}))
    assert [brown.has_colour(colour) for colour in ("brown", "orange", "blue")] == [YES, UNSURE, NO]


def texts(view: View, tries: int = 60) -> dict[str, tuple[int, ...]]:
    found = {}
    for seed in range(tries):
        found |= {e.text: e.objects for e in expressions_of(view, np.random.default_rng(seed), 8)}
    return found


def test_what_is_too_close_to_call_is_not_said() -> None:
    view = View([thing("dog", 0.5, 0.48), thing("dog", 0.53, 0.52)], complete=True)
    assert texts(view) == {}


def test_an_object_that_may_share_the_noun_makes_it_ambiguous() -> None:
    taxi = thing("taxi", 0.2, 0.2, may_be=frozenset({"car"}))
    found = texts(View([taxi, thing("car", 0.8, 0.8)], complete=True, absent=["dog"]))
    assert "the taxi" in found and "the dog" in found and not any(text.endswith(" car") for text in found)


def test_a_doubtful_noun_is_not_spoken_of() -> None:
    view = View([thing("dog", 0.2, 0.2), thing("axe", 0.8, 0.8)], False, frozenset({"dog"}), ["cat"])
    found = texts(view)
    assert found["the axe"] == (1,) and found["the cat"] == ()
    assert not any("dog" in text or "object" in text or "thing" in text for text in found)


def coco_sample() -> Sample:
    dogs, others = (
        [[0, 0, 40, 40], [60, 10, 90, 90]],
        [[100, 50, 190, 99], [5, 60, 30, 90], [150, 0, 199, 40]],
    )
    return Sample(
        image=np.zeros((100, 200, 3), np.uint8),
        boxes=np.array(dogs + others, np.float32),
        names=["dog", "dog", "cat", "person", "person"],
        area=np.array([900, 2000, 4000, 500, 1500], np.float32),
        iscrowd=np.array([False, False, False, False, True]),
        image_id=1,
        vocabulary=("dog", "cat", "person", "kite"),
    )


def test_derived_expressions() -> None:
    sample = coco_sample()
    found = {}
    for seed in range(80):
        found |= {e.text: e.objects for e in derived_expressions(sample, np.random.default_rng(seed))}
    assert found["the cat"] == (2,) and found["the kite"] == ()
    assert found["the largest dog"] == found["the rightmost dog"] == (1,)
    assert found["the smallest dog"] == found["the leftmost dog"] == (0,)
    assert found["the dog closest to the cat"] == (1,)
    assert not any("person" in text or "object" in text for text in found)  # there is a crowd of persons
    reader = Reader(sample.names, sample.boxes / (2, 1, 2, 1), sample.area, 100)
    for text, objects in found.items():
        assert reader.read(text) == list(objects), text


@pytest.mark.parametrize("count", [0, 1, 5])
def test_as_many_as_asked_for(count: int) -> None:
    assert len(derived_expressions(coco_sample(), np.random.default_rng(0), count)) == count


def test_a_picture_without_objects() -> None:
    sample = coco_sample()
    empty = Sample(
        sample.image, np.zeros((0, 4), np.float32), [], np.zeros(0), np.zeros(0, bool), 2, ("dog", "cat")
    )
    assert derived_expressions(empty, np.random.default_rng(0)) == []
