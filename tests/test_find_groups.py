"""Groups of names asked with what they share computed once, against whole prompts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_network import NAMES, pictures, small_network

from visionllm.instruction import EVAL_TEMPLATES, Instruction
from visionllm.model.groups import find_groups, read_names
from visionllm.model.scores import token_scores
from visionllm.model.slots import extent_of, points_of

GROUPS = [Instruction(classes=NAMES[:2]), Instruction(classes=NAMES[2:])]


@pytest.fixture(scope="module")
def network():
    network = small_network(known_power=0.5, tasks=("detection", "captioning"))
    network.known_names = ("dog", "bird", "Cup")
    return network


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_one_group_is_an_ordinary_prompt(network):
    asked = Instruction(classes=NAMES)
    images = pictures(3)
    (answers,) = find_groups(network, images, [asked])
    with torch.inference_mode():
        prompts, text, tokens = network.see("find", images, [asked] * 3, ("detection",))
        reading = network.read_slots(prompts, text, tokens)
        expected = reading.answers(network.config.coordinate_window)
        scores = token_scores(network, prompts, text, tokens, [asked] * 3, expected.probabilities)
    close(answers.probabilities, expected.probabilities)
    close(answers.boxes, extent_of(points_of(expected.offsets, reading.boxes)).clamp(0, 1))
    a, c = network.config.objectness_power, network.config.known_power
    close(
        answers.objectness[..., None] ** a * answers.probabilities[..., :-1] ** (1 - a) * answers.known**c,
        scores,
    )
    close(answers.centers, reading.boxes[..., :2])


def test_groups_are_prompts_over_the_same_image_tokens(network):
    """Each group's whole prompt, read from its beginning, over the image tokens of all names."""
    images = pictures(2)
    found = list(find_groups(network, images, GROUPS))
    assert [answers.probabilities.shape for answers in found] == [(2, 12, 3), (2, 12, 4)]
    everything = Instruction(classes=NAMES)
    with torch.inference_mode():
        _, _, tokens = network.see("find", images, [everything] * 2, ("detection",))
        for answers, group in zip(found, GROUPS, strict=True):
            prompts, text = network.asked([group] * 2)
            reading = network.read_slots(prompts, text, tokens)
            expected = reading.answers(network.config.coordinate_window)
            close(answers.probabilities, expected.probabilities)
            close(answers.boxes, extent_of(points_of(expected.offsets, reading.boxes)).clamp(0, 1))
    close(found[0].objectness, found[1].objectness)


def test_known_names_of_all_groups_are_no_rivals(network):
    answers = list(find_groups(network, pictures(1), GROUPS))
    (together,) = find_groups(network, pictures(1), [Instruction(classes=NAMES)])
    close(torch.cat([one.known for one in answers], -1), together.known)
    network = small_network(tasks=("detection",))
    assert next(find_groups(network, pictures(1), GROUPS)).known is None


def test_the_order_of_groups_changes_nothing(network):
    """A group leaves nothing behind in the cache."""
    forward = list(find_groups(network, pictures(1), GROUPS))
    turned = list(find_groups(network, pictures(1), GROUPS[::-1]))
    for first, second in zip(forward, turned[::-1], strict=True):
        close(first.probabilities, second.probabilities)
        close(first.boxes, second.boxes)


def test_names_that_were_read_before(network):
    read = read_names(network, GROUPS)
    for seed in (1, 2):
        images = pictures(2, seed=seed)
        for first, second in zip(
            find_groups(network, images, read), find_groups(network, images, GROUPS), strict=True
        ):
            close(first.probabilities, second.probabilities)


def test_bad_groups(network):
    after = next(
        one for one in EVAL_TEMPLATES["detection"] if one.text.index("<class>") < one.text.index("<image>")
    )
    for groups, message in (
        ([], "at least one group, got none"),
        ([GROUPS[0], GROUPS[0]], "'dog' is in two groups"),
        ([dataclasses.replace(GROUPS[0], task="grounding")], "the task must be detection, got grounding"),
        ([after.instruction(NAMES)], "<image> must stand before the class set"),
    ):
        with pytest.raises(ValueError, match=message):
            next(find_groups(network, pictures(1), groups))
    with pytest.raises(ValueError, match=r"images must be uint8 \[B, 64, 64, 3\], got torch.float32"):
        next(find_groups(network, pictures(1).float(), GROUPS))
