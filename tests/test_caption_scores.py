"""BLEU, CIDEr and the words of captions, against the published evaluation where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionllm.evaluate.caption_scores import bleu, caption_scores, cider
from visionllm.evaluate.caption_words import caption_words

# Left: captions; right: what Stanford's tokenizer makes of them, punctuation left out.
SPLIT = {
    "A red car, and a dog's tail.": "a red car and a dog 's tail",
    "Two people can't ride (a bike) today!": "two people ca n't ride -lrb- a bike -rrb- today",
    "a black-and-white cat -- sitting...": "a black-and-white cat sitting",
    "It's 3.5 ft. at 10:30 a.m. in the U.S.": "it 's 3.5 ft. at 10:30 a.m. in the u.s.",
    "the sign says \"stop\" & 'go' 50% $5.00 #1": "the sign says stop & go 50 % $ 5.00 # 1",
    "a man in a t-shirt w/ black/white stripes; he'll jump: won't he?": (
        "a man in a t-shirt w / black/white stripes he 'll jump wo n't he"
    ),
    "Mr. Smith cannot gonna see the women's room": "mr. smith can not gon na see the women 's room",
    "the boys' hats are on the table .": "the boys hats are on the table",
    "1,000 balls and 2-3 cats": "1,000 balls and 2-3 cats",
    "a café in são paulo": "a café in são paulo",
    "o'clock he'd they've": "o'clock he 'd they 've",
    "st. patrick's day parade": "st. patrick 's day parade",
    "hello,world a.b": "hello world a.b",
    "“smart” quotes – and — dash’s it’s": "smart quotes and dash 's it 's",
    "two  spaces. And a second sentence.": "two spaces and a second sentence",
    "don’t": "do n't",
    "1990's style; '90s": "1990 's style '90s",
    "a 12\" pizza 5' tall": "a 12 pizza 5 tall",
    "[brackets] {curly}": "-lsb- brackets -rsb- -lcb- curly -rcb-",
    "a #hashtag @home": "a #hashtag @home",
    "three dogs,a cat and the 2nd bird.": "three dogs a cat and the 2nd bird",
    "": "",
}
CAPTIONS = [
    ("a red car on a road", ["a red car is on the road", "there is a car"]),
    ("two dogs", ["two dogs play with a ball", "dogs"]),
    ("", ["a cat"]),
    ("the the the the the", ["the cat on the mat", "a cat on the mat with the other cat"]),
]


@pytest.mark.parametrize("text", SPLIT)
def test_words(text):
    assert " ".join(caption_words(text)) == SPLIT[text]


@pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="needs pycocoevalcap and Java",
)
def test_words_are_those_of_the_published_tokenizer():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = [text for text in SPLIT if text]
    found = PTBTokenizer().tokenize({index: [{"caption": text}] for index, text in enumerate(texts)})
    assert {text: found[index][0] for index, text in enumerate(texts)} == {
        text: SPLIT[text] for text in texts
    }


def published(candidates: list[str], references: list[list[str]]) -> list[float]:
    bleu_module = pytest.importorskip("pycocoevalcap.bleu.bleu_scorer", reason="needs pycocoevalcap")
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer, consensus = bleu_module.BleuScorer(n=4), CiderScorer()
    for said, right in zip(candidates, references, strict=True):
        scorer += (said, right)
        consensus += (said, right)
    with contextlib.redirect_stdout(io.StringIO()):
        return [*scorer.compute_score(option="closest")[0], float(consensus.compute_score()[0])]


WORDS = st.lists(st.sampled_from("a the cat dog red on two".split()), max_size=9).map(" ".join)
REFERENCES = st.lists(
    st.lists(st.sampled_from("a the cat dog red on two".split()), min_size=1, max_size=9).map(" ".join),
    min_size=1,
    max_size=3,
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(WORDS, REFERENCES), min_size=2, max_size=5))
def test_numbers_are_those_of_the_published_evaluation(pairs):
    candidates, references = [said for said, _ in pairs], [right for _, right in pairs]
    found = caption_scores(candidates, references)
    assert list(found) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr"]
    assert list(found.values()) == pytest.approx(published(candidates, references), abs=1e-9)


def test_numbers_of_some_captions():
    found = caption_scores([said for said, _ in CAPTIONS], [right for _, right in CAPTIONS])
    assert found == pytest.approx(PINNED, abs=1e-6)


# By pycocoevalcap 1.2.
PINNED = {
    "BLEU-1": 0.5935873,
    "BLEU-2": 0.3907470,
    "BLEU-3": 0.2654359,
    "BLEU-4": 0.0000423,
    "CIDEr": 1.1735279,
}


def test_by_hand():
    # 3 of 4 words and 1 of 3 pairs of words are in the reference; as long as it.
    assert bleu([["a", "b", "x", "c"]], [[["a", "b", "c", "d"]]])[:2] == pytest.approx(
        [3 / 4, (3 / 4 * 1 / 3) ** 0.5]
    )
    assert bleu([["a"]], [[["a", "b"]]])[0] == pytest.approx(0.36787944), "exp(1 - 2/1)"
    right = [[["a", "b", "c", "d"]], [["e", "f", "g", "h"]]]
    assert cider([["a", "b", "c", "d"], ["e", "f", "g", "h"]], right).tolist() == pytest.approx([10, 10])
    assert cider([["e", "f", "g", "h"], []], right).tolist() == [0, 0]


def test_bad_sets():
    assert set(caption_scores([], []).values()) == {-1.0}
    with pytest.raises(ValueError, match="a candidate for each of 2 pictures, got 1"):
        caption_scores(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="a list of references of picture 1, got"):
        caption_scores(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="a list of references of picture 0, got 'a'"):
        caption_scores(["a"], ["a"])
