"""Captions and questions of generated scenes: true, balanced, short; the colours and words they use."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from visionllm.data.expressions import Thing, View
from visionllm.data.sample import CAPTION_LENGTHS, QUESTION_KINDS, Sample
from visionllm.data.scenes import SceneDataset
from visionllm.data.scenes.captions import captions_of, place_of
from visionllm.data.scenes.colours import COLOUR_NAMES, clear_colour
from visionllm.data.scenes.language import view_of
from visionllm.data.scenes.questions import questions_of
from visionllm.data.scenes.shapes import COLOURS, SHAPES, shape_picture
from visionllm.english import NUMBERS, listed, one, plural, several


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    dataset = SceneDataset("train", seed=5, size=128, language=True)
    return [dataset[index] for index in range(200)]


def singular(noun: str) -> str:
    return {"crosses": "cross"}.get(noun, noun.removesuffix("s"))


def count_of(phrase: str, names: list[str]) -> int:
    """How many of the names a phrase in the plural ("red circles", "blue objects") counts."""
    colour, _, noun = phrase.rpartition(" ")
    noun = singular(noun)
    return sum((not colour or n.split()[0] == colour) and noun in ("object", n.split()[1]) for n in names)


def object_of(phrase: str, sample: Sample) -> int:
    """The one object that "red circle", "circle" or "object on the left" fits."""
    if phrase.startswith("object"):
        word = phrase.split()[-1]
        middle = (sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2 - 64
        axis, sign = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}[word]
        found = [k for k in range(len(sample.names)) if sign * middle[k, axis] > 0]
    else:
        found = [k for k, name in enumerate(sample.names) if phrase in (name, name.split()[1])]
    (k,) = found
    return k


def test_counts_are_right_and_spread(samples: list[Sample]) -> None:
    answers: Counter[str] = Counter()
    for sample in samples:
        for question in (q for q in sample.questions if q.kind == "count"):
            text = (
                question.text.removesuffix("?")
                .removeprefix("how many ")
                .removeprefix("what is the number of ")
            )
            for ending in (" are there", " do you see", " are in the picture"):
                text = text.removesuffix(ending)
            assert int(question.answer) == count_of(text, sample.names), (question, sample.names)
            answers[question.answer] += 1
    assert len(answers) >= 8 and max(answers.values()) < 0.4 * answers.total()


def test_colours_are_right_and_spread(samples: list[Sample]) -> None:
    answers: Counter[str] = Counter()
    for sample in samples:
        for question in (q for q in sample.questions if q.kind == "colour"):
            phrase = question.text.removesuffix("?").split(" the ", 1)[1].removeprefix("colour of the ")
            k = object_of(phrase.removeprefix("color of the "), sample)
            assert sample.names[k].split()[0] == question.answer, (question, sample.names)
            answers[question.answer] += 1
    assert set(answers) == set(COLOURS) and max(answers.values()) < 0.25 * answers.total()


def test_places_are_right(samples: list[Sample]) -> None:
    seen: Counter[str] = Counter()
    for sample in samples:
        centres = (sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2 / 128
        for question in (q for q in sample.questions if q.kind == "position"):
            words = question.text.removesuffix("?").split(" the ")
            seen[question.answer] += 1
            if question.text.startswith(("where", "in which")):
                x, y = centres[object_of(words[-1], sample)]
                said = question.answer.split()
                assert ("left" in said) == (x < 0.35) and ("right" in said) == (x > 0.65)
                assert ("top" in said) == (y < 0.35) and ("bottom" in said) == (y > 0.65)
            elif question.answer in ("above", "below"):
                first = object_of(words[1].removesuffix(" above or below"), sample)
                higher = centres[first, 1] < centres[object_of(words[-1], sample), 1]
                assert question.answer == ("above" if higher else "below")
    assert len(seen) >= 10 and max(seen.values()) < 0.3 * seen.total()


def test_yes_and_no_are_balanced_and_existence_is_right(samples: list[Sample]) -> None:
    by_kind: dict[str, Counter[str]] = {"yes_no": Counter(), "comparison": Counter()}
    checked = 0
    for sample in samples:
        for question in sample.questions:
            if question.answer in ("yes", "no"):
                by_kind[question.kind][question.answer] += 1
            if question.text.startswith(("is there a", "do you see a", "are there more")):
                text = question.text.removesuffix("?").removesuffix(" in the picture")
                if text.startswith("are there more"):
                    more, fewer = text.removeprefix("are there more ").split(" than ")
                    right = count_of(more, sample.names) > count_of(fewer, sample.names)
                else:
                    right = count_of(text.split(" a", 1)[1].partition(" ")[2] + "s", sample.names) > 0
                assert question.answer == ("yes" if right else "no"), (question, sample.names)
                checked += 1
    assert checked > 200
    for counts in by_kind.values():
        assert 0.45 < counts["yes"] / counts.total() < 0.55


def test_the_words_of_a_question_do_not_tell_whether_it_is_there(samples: list[Sample]) -> None:
    """Bare shapes, coloured shapes and coloured objects are asked for in vain as often as not."""
    said: dict[str, Counter[str]] = {"bare": Counter(), "coloured": Counter()}
    for sample in samples:
        for question in sample.questions:
            if question.text.startswith(("is there a", "do you see a")):
                text = question.text.removesuffix("?").removesuffix(" in the picture")
                said["bare" if text.split()[-2] in ("a", "an") else "coloured"][question.answer] += 1
    for counts in said.values():
        assert counts.total() > 20 and 0.3 < counts["yes"] / counts.total() < 0.7


def test_which_is_larger(samples: list[Sample]) -> None:
    checked = 0
    for sample in samples:
        for question in sample.questions:
            if question.text.startswith(("which is larger", "which is smaller")):
                first, second = question.text.removesuffix("?").split(", the ")[1].split(" or the ")
                a, b = (float(sample.area[object_of(name, sample)]) for name in (first, second))
                larger = first if a > b else second
                assert (question.answer == larger) == ("larger" in question.text)
                checked += 1
    assert checked > 10


def test_questions_of_every_kind_once_each(samples: list[Sample]) -> None:
    assert {question.kind for sample in samples for question in sample.questions} == set(QUESTION_KINDS)
    for sample in samples:
        texts = [question.text for question in sample.questions]
        assert len(set(texts)) == len(texts) <= 2 * len(QUESTION_KINDS)
        assert all(text == text.lower() and text.endswith("?") for text in texts)
        assert all(len(question.answer.split()) <= 3 for question in sample.questions)


def test_captions_get_longer_and_name_what_is_there(samples: list[Sample]) -> None:
    words = {length: 0 for length in CAPTION_LENGTHS}
    for sample in samples:
        assert tuple(sample.captions) == CAPTION_LENGTHS
        for length, references in sample.captions.items():
            assert len(references) >= 2 and len(set(references)) == len(references)
            words[length] += len(references[0].split())
            for text in references:
                assert text == text.lower()
                for colour in COLOURS:  # whatever coloured shape is named is there
                    for shape in SHAPES:
                        if f"{colour} {shape}" in text:
                            assert f"{colour} {shape}" in sample.names
        largest = sample.names[int(np.argmax(sample.area))]
        assert largest in sample.captions["detailed"][0]
        if len(sample.names) <= 6:
            named = sum(sample.captions["detailed"][-1].count(name) for name in set(sample.names))
            assert named == len(sample.names)
    assert words["short"] * 1.5 < words["long"] < words["detailed"] / 1.5


def test_a_photo_behind_hides_what_is_not_certain() -> None:
    rng = np.random.default_rng(0)
    picture = shape_picture("red circle", 60, rng)[..., :3]
    owner = np.zeros(picture.shape[:2], np.int8)
    boxes, area = np.array([[0, 0, 60, 60]], np.float32), np.array([3600], np.float32)
    names, vocabulary = ["dog"], ("dog", "cat", "axe")
    view = view_of(picture, owner, names, boxes, area, vocabulary, frozenset({"dog", "cat"}), {})
    assert not view.complete and not view.nouns
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert not any("objects" in q.text or " dog" in q.text for q in questions_of(view, rng))
        assert not any(word in captions_of(view, names, rng)["long"][0] for word in ("object", "cat"))


def test_language_depends_on_the_scene_alone() -> None:
    first, second = (SceneDataset("val", seed=1, size=96, language=True) for _ in range(2))
    plain = SceneDataset("val", seed=1, size=96)
    for index in (4, 2):
        a, b, c = first[index], second[index], plain[index]
        assert (a.expressions, a.captions, a.questions) == (b.expressions, b.captions, b.questions)
        assert np.array_equal(a.image, c.image) and not c.captions and not c.questions


def test_an_empty_scene_has_nothing_to_say() -> None:
    view = View([], complete=True)
    rng = np.random.default_rng(0)
    assert captions_of(view, [], rng) == {} and questions_of(view, rng) == []


@pytest.mark.parametrize("colour", list(COLOURS))
def test_colours_of_shapes_are_recognised(colour: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        picture = shape_picture(f"{colour} square", 20, rng)[2:-2, 2:-2, :3].reshape(-1, 3)
        clear, possible = clear_colour(picture)
        assert colour in possible and clear in (colour, None, "grey" if colour == "white" else colour)


def test_an_object_of_two_colours_has_no_clear_one() -> None:
    pixels = np.array([[230, 20, 20]] * 50 + [[20, 40, 230]] * 50, np.uint8)
    clear, possible = clear_colour(pixels)
    assert clear is None and {"red", "blue"} <= possible <= set(COLOUR_NAMES) and "yellow" not in possible


def test_words() -> None:
    words = {"dog": "dogs", "red cross": "red crosses", "cherry": "cherries", "blue mouse": "blue mice"}
    assert {noun: plural(noun) for noun in words} == words
    assert plural("skis") == "skis" and plural("bus") == "buses"
    assert [one(noun) for noun in ("dog", "orange star", "unicorn", "hourglass", "scissors", "bread")] == [
        "a dog", "an orange star", "a unicorn", "an hourglass", "scissors", "bread",
    ]  # fmt: skip
    assert (
        several(3, "dog") == "three dogs" and several(1, "axe") == "an axe" and several(2, "skis") == "skis"
    )
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c"
    assert len(NUMBERS) == 11


def test_places() -> None:
    def at(x: float, y: float) -> str:
        return place_of(Thing(("dog",), x, y, 0.1, 0.1, 0.01))

    assert (at(0.1, 0.1), at(0.9, 0.5), at(0.5, 0.5)) == ("at the top left", "on the right", "in the middle")
    assert at(0.5, 0.9) == "at the bottom"
