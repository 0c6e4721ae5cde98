"""Evaluation of expressions, captions and answers, with a network whose right and wrong answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from colour_network import ColourNetwork
from coloured_samples import coloured_samples
from hypothesis import given
from hypothesis import strategies as st

from visionllm.data.sample import Expression
from visionllm.evaluate.answering import answer_words, evaluate_answers, exact_match, token_f1
from visionllm.evaluate.captioning import evaluate_captions
from visionllm.evaluate.grounding import evaluate_grounding
from visionllm.evaluate.samples import SampleSet
from visionllm.instruction import TRAIN_TEMPLATES
from visionllm.pipeline import VisionLLM
from visionllm.text_options import TextOptions


@pytest.fixture
def dataset() -> SampleSet:
    return SampleSet(coloured_samples())


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_expressions_that_are_found(dataset, at_once):
    network, progress = ColourNetwork(), []
    found = evaluate_grounding(VisionLLM(network), dataset, None, at_once, 2, progress.append)
    numbers = found.to_dict()
    assert numbers["P@0.5"] == numbers["P@0.5_answered"] == numbers["accuracy"] == 1
    assert (numbers["expressions"], numbers["present"], numbers["absent"]) == (10, 6, 4)
    assert numbers["absent_found"] == 1 and numbers["absent_said_wrongly"] == 0
    assert numbers["absent_auc"] == 1 and numbers["malformed"] == 0 and numbers["mean_iou"] > 0.95
    assert sum(progress) == 10
    asked = [instruction for call in network.calls for instruction in call]
    assert max(len(instruction.classes) for instruction in asked) == min(at_once, 4)
    assert all(instruction.task == "grounding" for instruction in asked)


def test_expressions_that_are_not_found():
    samples = coloured_samples()[:1]
    samples[0].expressions = [
        Expression("the red thing", (1,)),  # the network boxes the red one, which is object 0
        Expression("the blue thing", (0, 1)),  # one of them is enough
        Expression("the tiny thing", (0,)),  # not understood: said to be absent
        Expression("something red", ()),  # wrongly boxed
    ]
    network = ColourNetwork()
    found = evaluate_grounding(VisionLLM(network), SampleSet(samples))
    by_text = {one.text: one for one in found.expressions}
    assert [one.right for one in found.expressions] == [False, True, False, False]
    assert by_text["the red thing"].iou == 0 and not by_text["the red thing"].said_absent
    assert by_text["the tiny thing"].said_absent and not by_text["something red"].said_absent
    numbers = found.to_dict()
    assert numbers["P@0.5"] == pytest.approx(1 / 3) and numbers["accuracy"] == 1 / 4
    assert numbers["absent_said_wrongly"] == pytest.approx(1 / 3) and numbers["absent_found"] == 0
    assert numbers["absent_auc"] == pytest.approx(1 / 3), "tied with two, below the third"


def test_the_same_words_are_not_asked_at_once(dataset):
    samples = coloured_samples()[:1]
    samples[0].expressions = [Expression("the red thing", (0,))] * 3
    network = ColourNetwork()
    template = TRAIN_TEMPLATES["grounding"][0]
    found = evaluate_grounding(VisionLLM(network), SampleSet(samples), template, at_once=4)
    assert len(found.expressions) == 3 and sum(map(len, network.calls)) == 3
    assert network.calls[0][0].text == template.instruction(["the red thing"]).text


def test_a_box_below_the_threshold_counts_for_precision_and_not_as_an_answer(dataset):
    model = VisionLLM(ColourNetwork())
    model.threshold = 0.95
    numbers = evaluate_grounding(model, dataset).to_dict()
    assert numbers["P@0.5"] == 1 and numbers["P@0.5_answered"] == 0
    assert numbers["absent_found"] == numbers["absent_said_wrongly"] == 1


def test_captions(dataset):
    network, options = ColourNetwork(), TextOptions(max_tokens=7)
    found = evaluate_captions(VisionLLM(network), dataset, options=options, batch_size=2)
    numbers = found.to_dict()
    assert list(numbers) == ["short", "long"], "there are no detailed references"
    assert network.options == options
    assert numbers["short"]["pictures"] == 3 and numbers["short"]["BLEU-1"] == pytest.approx(1)
    assert numbers["long"]["BLEU-4"] == pytest.approx(1) and numbers["long"]["CIDEr"] > 5
    assert numbers["long"]["words"] == numbers["short"]["words"] + 3 == numbers["long"]["reference_words"]
    assert numbers["short"]["distinct"] == 3
    assert [one.caption for one in found.captions][:3] == ["red and blue", "green", "red and yellow and pink"]


def test_captions_that_are_wrong(dataset):
    class Same(ColourNetwork):
        def write(self, images, instructions, options=None, on_text=None):
            return ["a cat"] * len(images)

    numbers = evaluate_captions(VisionLLM(Same()), dataset, ["long"]).to_dict()["long"]
    assert numbers["distinct"] == 1 and numbers["CIDEr"] < 0.1 and numbers["BLEU-4"] < 0.01


def test_wording_of_captions(dataset):
    templates = [one for one in TRAIN_TEMPLATES["captioning"] if one.length == "long"][:1]
    network = ColourNetwork()
    evaluate_captions(VisionLLM(network), dataset, ["short", "long"], templates)
    wordings = {one.length: one.text for call in network.calls for one in call}
    assert wordings == {"short": None, "long": templates[0].instruction(()).text}


def test_answers(dataset):
    network, progress = ColourNetwork(), []
    found = evaluate_answers(VisionLLM(network), dataset, batch_size=3, done=progress.append)
    numbers = found.to_dict()
    assert sum(progress) == numbers["questions"] == 8
    assert numbers["by_kind"]["count"]["exact_match"] == 3 / 4, "the empty picture gets no answer"
    assert numbers["by_kind"]["yes_no"]["exact_match"] == 0
    assert numbers["exact_match"] == numbers["f1"] == 3 / 8
    assert network.calls[0][0].question == "how many colours are there ?"
    template = TRAIN_TEMPLATES["vqa"][1]
    evaluate_answers(VisionLLM(network), dataset, template)
    assert network.calls[-1][-1].text == template.instruction((), question="is there something ?").text


@pytest.mark.parametrize("task", [evaluate_grounding, evaluate_captions, evaluate_answers])
def test_samples_without_language(task):
    samples = coloured_samples()
    for sample in samples:
        sample.expressions, sample.captions, sample.questions = [], {}, []
    with pytest.raises(ValueError, match="expected samples with .*, got none"):
        task(VisionLLM(ColourNetwork()), SampleSet(samples))


def test_bad_arguments(dataset):
    with pytest.raises(ValueError, match="lengths: expected some of short, long, detailed, got 'huge'"):
        evaluate_captions(VisionLLM(ColourNetwork()), dataset, ["huge"])
    with pytest.raises(ValueError, match="batch_size: expected 1 or more, got 0"):
        evaluate_answers(VisionLLM(ColourNetwork()), dataset, batch_size=0)


@pytest.mark.parametrize(
    ("said", "right", "same", "f1"),
    [
        ("Red.", "red", True, 1),
        ("the two dogs", "2 dogs", True, 1),
        ("red", "blue", False, 0),
        ("left of the car", "left", False, 0.5),
        ("", "yes", False, 0),
        ("", "", True, 1),
        ("red red", "red", False, 2 / 3),
        ("none", "0", True, 1),
        ("3.5", "3,5", False, 0),
    ],
)
def test_words_of_answers(said, right, same, f1):
    assert exact_match(said, right) is same
    assert token_f1(said, right) == pytest.approx(f1)


@given(st.text(max_size=20), st.text(max_size=20))
def test_f1_is_symmetric_and_one_for_equal_words(first, second):
    assert token_f1(first, second) == token_f1(second, first)
    assert (token_f1(first, second) == 1) == (sorted(answer_words(first)) == sorted(answer_words(second)))
    assert 0 <= token_f1(first, second) <= 1


def test_pictures_are_read_once_a_batch(dataset):
    reads = []
    read = dataset.read
    dataset.read = lambda image: reads.append(image["id"]) or np.array(read(image))
    evaluate_answers(VisionLLM(ColourNetwork()), dataset, batch_size=8)
    assert sorted(reads) == [1, 2, 3, 4]
