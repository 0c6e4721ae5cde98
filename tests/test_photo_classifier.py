"""The photo classifier: what it reads, what it calls things, how it is fitted, and what scores make of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_network import pictures, small_network
from torch import nn

from visionllm.data.coco import CocoDataset
from visionllm.data.sample import Sample
from visionllm.evaluate.large_vocabulary import detect_in_groups
from visionllm.image import cut_out
from visionllm.instruction import Instruction
from visionllm.instruction.instruction import TASKS
from visionllm.model.config import ModelConfig
from visionllm.model.groups import find_groups
from visionllm.model.network import Network
from visionllm.model.photo_classifier import (
    CHANNELS,
    CLASSES,
    CLOSER_SIDE,
    FLOOR,
    GAIN,
    PARTS,
    PhotoClassifier,
    averaged,
    call_boxes,
    chances,
    place,
    renamed,
)
from visionllm.model.told import name_chances
from visionllm.pipeline import Pictures, VisionLLM
from visionllm.text_options import TextOptions
from visionllm.train import calibrate
from visionllm.train import photo_classifier as fitting
from visionllm.train.validation import ValidationSet

NAMES = ("person", "dog", "cat")


def classified(seed: int = 0, **changes) -> Network:
    """A small network with a photo classifier of random weights."""
    network = small_network(seed, keep_pretrained=True, classifier_names=NAMES, **changes)
    classifier = network.image_tokenizer.classifier
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        classifier.members[:300] = torch.arange(300, dtype=torch.int16) % len(NAMES)
    return network


def enlivened(network: Network) -> Network:
    """A network whose random trunk lets a picture through: by itself little is left of it at the end."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in network.image_tokenizer.backbone.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    return network


def published_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """The last layers of a published state dict, random."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return 0.05 * torch.randn(shape, generator=generator)

    return {
        "_conv_head.weight": some(CHANNELS, 320, 1, 1),
        "_bn1.weight": 1 + some(CHANNELS),
        "_bn1.bias": some(CHANNELS),
        "_bn1.running_mean": some(CHANNELS),
        "_bn1.running_var": 1 + some(CHANNELS).abs(),
        "_fc.weight": some(CLASSES, CHANNELS),
        "_fc.bias": some(CLASSES),
    }


def average_by_cells(features: np.ndarray, box: np.ndarray) -> np.ndarray:
    """float64 [C], by summing over fine subcells whose centres lie in the box."""
    fine = 200
    c, h, w = features.shape
    x, y = (np.arange(n * fine) / fine + 0.5 / fine for n in (w, h))
    (x1, y1), (x2, y2) = np.clip(box[:2] - box[2:] / 2, 0, 1), np.clip(box[:2] + box[2:] / 2, 0, 1)
    columns, rows = (x > x1 * w) & (x < x2 * w), (y > y1 * h) & (y < y2 * h)
    large = features.repeat(fine, 1).repeat(fine, 2)
    return large[:, rows][:, :, columns].mean((1, 2))


@pytest.mark.parametrize(
    "box",
    [(0.5, 0.5, 1, 1), (0.4, 0.6, 0.3, 0.5), (0.1, 0.1, 0.05, 0.07), (0.9, 0.5, 0.6, 2), (0.5, 0.5, 3, 0.4)],
    ids=str,
)
def test_means_over_boxes(box):
    features = np.random.default_rng(0).normal(size=(3, 4, 5))
    expected = average_by_cells(features, np.array(box))
    found = averaged(torch.tensor(features)[None], torch.tensor(box, dtype=torch.float64)[None, None])
    assert found[0, 0].numpy() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    "box", [(0.3, 0.6, 0, 0), (1, 1, 0, 0), (1.5, -0.5, 0.1, 0.1), (0, 0, 0, 0.5)], ids=str
)
def test_boxes_without_extent_read_the_cell_they_lie_in(box):
    features = torch.arange(12.0).view(1, 1, 3, 4)
    found = averaged(features, torch.tensor(box)[None, None]).item()
    column, row = min(int(max(box[0], 0) * 4), 3), min(int(max(box[1], 0) * 3), 2)
    if box[3] == 0.5:
        assert 0 <= found <= 4  # between the first rows of its column
    else:
        assert found == pytest.approx(4 * row + column, abs=1e-2)


def test_a_whole_picture_is_classified_as_the_published_network_does():
    state = published_state()
    norm = nn.BatchNorm2d(CHANNELS, eps=1e-3).eval()
    norm.load_state_dict(
        {key: state[f"_bn1.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}, strict=False
    )
    c5 = torch.randn(2, 320, 5, 7)
    head = norm(F.conv2d(c5, state["_conv_head.weight"])).clamp(0, 6).mean((2, 3))
    expected = F.linear(head, state["_fc.weight"], state["_fc.bias"]).softmax(-1)
    classifier = PhotoClassifier(len(NAMES))
    classifier.load_imagenet(state)
    classifier.members[:500] = 1
    with torch.no_grad():
        boxes = torch.tensor([0.5, 0.5, 1, 1]).expand(2, 1, 4)
        inside, whole, _ = classifier.from_afar(classifier.cells(c5), boxes)
        told = classifier.told(inside, inside)
    assert torch.allclose(inside[:, 0], head, atol=1e-5)
    assert torch.allclose(whole[:, 0], head, atol=1e-5)
    assert torch.allclose(told[:, 0, 1], GAIN * expected[:, :500].sum(1).log(), atol=1e-5)
    assert told[..., [0, 2, 3]] == pytest.approx(GAIN * FLOOR)


def test_places_of_boxes():
    found = place(torch.tensor([[0.2, 0.3, 0.5, 0.25], [0.5, 0.5, 0.0, 1.0]]))
    expected = [
        [0.2, 0.3, math.log(0.5), math.log(0.25), math.log(2)],
        [0.5, 0.5, math.log(1e-3), 0, math.log(1e-3)],
    ]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-6)  # finite also without extent


def test_rows_see_the_whole_photo_and_where_a_box_lies_but_imagenet_does_not():
    classifier = classified().image_tokenizer.classifier
    cells, boxes = torch.rand(1, CHANNELS, 4, 4), torch.tensor([[[0.25, 0.25, 0.5, 0.5]]])
    other = cells.clone()
    other[..., 2:] += 1  # beside the box
    with torch.no_grad():
        first, second = (classifier.from_afar(c, boxes) for c in (cells, other))
        assert torch.equal(classifier.told(first[0], first[0]), classifier.told(second[0], second[0]))
        named = classifier(first[0], *first)
        assert not torch.allclose(named, classifier(second[0], *second))
        inside, whole, where = first
        elsewhere = classifier(inside, inside, whole, place(boxes + 0.1))
        assert not torch.allclose(named, elsewhere) and torch.equal(named, classifier(inside, *first))
        assert torch.equal(where, place(boxes))


def test_probabilities_are_those_of_rows_and_classes():
    classifier = classified().image_tokenizer.classifier
    cells, boxes, closer = torch.rand(2, CHANNELS, 3, 3), torch.rand(2, 5, 4), torch.rand(2, 5, CHANNELS)
    with torch.no_grad():
        parts = closer, *classifier.from_afar(cells, boxes)
        found = classifier(*parts)
        assert [part.shape[-1] for part in parts] == list(PARTS)
        every = torch.cat([part.expand(2, 5, -1) for part in parts], -1)
        told = [classifier.told(part, part) for part in parts[:2]]
        logits = classifier.rows(every) + (told[0] + told[1]) / 2
    assert found.shape == (2, 5, len(NAMES) + 1)
    assert torch.allclose(found, logits.softmax(-1), atol=1e-6)


def test_a_closer_look_reads_the_part_inside_a_box_and_nothing_else():
    network = enlivened(small_network(keep_pretrained=True))
    classifier, trunk = PhotoClassifier(len(NAMES)), network.image_tokenizer.backbone
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (120, 200, 3), np.uint8)
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.4], [0.2, 0.8, 0.1, 0.2], [0.5, 0.5, 1, 1]])
    with torch.no_grad():
        found = classifier.look(trunk, photo, boxes)
        beside = photo.copy()
        beside[:30], beside[:, 160:] = 0, 255  # beyond the first two boxes
        again = classifier.look(trunk, beside, boxes)
        part = cut_out(photo, np.array([[0.25, 0.3, 0.75, 0.7]]), CLOSER_SIDE)
        alone = classifier.cells(trunk.pretrained_c5(torch.from_numpy(part))).mean((2, 3))
    assert found.shape == (3, CHANNELS) and found[0].std() > 0
    assert torch.equal(found[:2], again[:2]) and not torch.allclose(found[2], again[2])
    assert torch.allclose(found[0], alone[0], atol=1e-3)


def test_the_boxes_most_likely_to_be_objects_get_a_closer_look():
    network = photos_only(enlivened(classified(classifier_boxes=2)))
    tokenizer, photo = network.image_tokenizer, pictures(1)[0].numpy()
    tokens, listed, _ = tokens_of(network)
    queries = network.config.num_queries
    with torch.no_grad():
        tokens.boxes[-1][:] = torch.rand(1, queries, 4) * 0.1 + torch.tensor([0.45, 0.45, 0.05, 0.05])
        tokens.boxes[-1][0, 3], tokens.boxes[-1][0, 1] = torch.tensor(
            [[0.3, 0.3, 0.4, 0.4], [0.7, 0.7, 0.4, 0.4]]
        )
        tokens.boxes[-1][0, 2] = tokens.boxes[-1][0, 3] + 0.01  # says again what 3 says
        tokens.objectness[-1][:] = torch.linspace(-3, -2, queries)
        tokens.objectness[-1][0, :4] = torch.tensor([-4.0, 1.0, 2.0, 3.0])
        parts = network.config, tokenizer.backbone, tokenizer.classifier, tokens, listed
        plain, looked = call_boxes(*parts), call_boxes(*parts, [photo])
        afar = tokenizer.classifier.from_afar(
            tokenizer.classifier.cells(tokens.pretrained_c5), tokens.boxes[-1]
        )
        closer = afar[0].clone()
        closer[0, [3, 1]] = tokenizer.classifier.look(tokenizer.backbone, photo, tokens.boxes[-1][0, [3, 1]])
        closer[0, 2] = closer[0, 3]
        expected = tokenizer.classifier(closer, *afar)
    assert torch.allclose(looked, expected, atol=1e-6)
    changed = (looked - plain).abs().amax((0, 2)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [1, 2, 3]
    without = replace(network.config, classifier_boxes=0), *parts[1:]
    assert torch.allclose(call_boxes(*without, [photo]), plain, atol=1e-6)


def test_chances_of_listed_names():
    called = torch.tensor([[[0.5, 0.3, 0.1, 0.1]], [[0.5, 0.3, 0.1, 0.1]], [[0.2, 0.2, 0.2, 0.4]]])
    found, knows = chances(called, NAMES, [("Dog", "unicorn", "cat"), ("unicorn",), ()])
    assert found[0, 0].tolist() == pytest.approx([0.3, 0.6, 0.1])
    assert found[1, 0].tolist() == pytest.approx([1, 0, 0])  # behind a shorter list nothing
    assert found[2, 0].tolist() == [0, 0, 0]
    assert knows.tolist() == [True, False, False]


def test_a_name_that_is_listed_in_two_cases_counts_once():
    found, _ = chances(torch.tensor([[[0.5, 0.3, 0.1, 0.1]]]), NAMES, [("dog", "DOG", "unicorn")])
    assert found[0, 0].tolist() == pytest.approx([0.3, 0.3, 0.7])


def tokens_of(network: Network, drawing: float = -1.0):
    classes = ("dog", "person", "apple")
    asked = Instruction(task="detection", classes=classes)
    with torch.no_grad():
        _, _, tokens = network.see("find", pictures(1), [asked], ("detection",))
    tokens.drawing = torch.tensor([drawing])
    probabilities = torch.rand(1, network.config.num_queries, 4).softmax(-1)
    return tokens, [classes], probabilities[..., :-1]


def photos_only(network: Network) -> Network:
    """A network that takes all pictures for photos."""
    with torch.no_grad():
        network.image_tokenizer.router.weight.zero_()
        network.image_tokenizer.router.bias.fill_(-1)
    return network


def test_renaming_keeps_whether_there_is_an_object():
    network = photos_only(classified())
    tokens, listed, p = tokens_of(network)
    found = renamed(network.config, tokens, listed, p)
    assert torch.allclose(found.sum(-1), p.sum(-1))
    q, _ = chances(tokens.called, NAMES, listed)
    w = network.config.classifier_power
    ratio = found / (p ** (1 - w) * q**w)
    assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-4)
    assert not torch.allclose(found, p, atol=1e-3)


@pytest.mark.parametrize("case", ["drawing", "power 0", "unknown names", "certain of another"])
def test_where_the_classifier_says_nothing(case):
    network = photos_only(classified())
    tokens, listed, p = tokens_of(network, drawing=1.0 if case == "drawing" else -1.0)
    assert tokens.called is not None
    config = network.config
    if case == "power 0":
        config = replace(config, classifier_power=0.0)
    if case == "unknown names":
        listed = [("apple", "unicorn", "zebra crossing")]
    if case == "certain of another":  # no listed name has any chance: no division by zero
        tokens.called = torch.tensor([0.0, 0.0, 1.0, 0.0]).expand_as(tokens.called)
        found = renamed(config, tokens, [("dog", "person")], p[..., 1:])
        assert torch.isfinite(found).all() and (found == 0).all()
        return
    assert torch.equal(renamed(config, tokens, listed, p), p)


def test_names_told_to_the_words_are_renamed_too():
    network = photos_only(classified())
    network.known_names = ("dog", "apple", "cat")
    tokens, _, _ = tokens_of(network)
    network.call_photos(tokens, [network.known_names], None)
    with torch.no_grad():
        found = name_chances(network, tokens)
        tokens.drawing = torch.tensor([1.0])
        plain = name_chances(network, tokens)
    assert torch.allclose(found.sum(-1), torch.ones(1)) and not torch.allclose(found, plain, atol=1e-3)
    q, _ = chances(tokens.called, NAMES, [network.known_names])
    w = network.config.classifier_power
    both = plain ** (1 - w) * q**w
    assert torch.allclose(found, both / both.sum(-1, keepdim=True), atol=1e-5)


def test_drawings_are_not_classified():
    network = classified()
    asked = [Instruction(task="detection", classes=NAMES)] * 2
    for bias, expected in ((1.0, False), (-1.0, True)):
        with torch.no_grad():
            network.image_tokenizer.router.weight.zero_()
            network.image_tokenizer.router.bias.fill_(bias)
            _, _, tokens = network.see("find", pictures(2), asked, ("detection",))
        assert (tokens.called is not None) == expected
    assert tokens.of(torch.tensor([1])).called.shape[0] == 1


def test_photos_are_answered_alike_alone_in_a_batch_and_in_groups():
    network = photos_only(classified())
    asked = Instruction(task="detection", classes=NAMES)
    images = pictures(3)
    together = network.find(images, [asked] * 3)
    alone = network.find(images[1:2], [asked])[0]
    assert torch.allclose(together[1].scores, alone.scores, atol=1e-5)
    groups = next(find_groups(network, images[1:2], [asked]))
    config = network.config
    score = groups.objectness[..., None] ** config.objectness_power
    score = score * groups.probabilities[..., :-1] ** (1 - config.objectness_power)
    assert score.max().item() == pytest.approx(alone.scores[0].item(), abs=1e-4)
    network.config = replace(config, classifier_power=0.0)
    assert not torch.allclose(network.find(images[1:2], [asked])[0].scores, alone.scores, atol=1e-4)


def test_pictures_are_read_before_resizing():
    network = photos_only(enlivened(classified()))
    model = VisionLLM(network)
    large = np.random.default_rng(0).integers(0, 256, (3, 200, 300, 3), np.uint8)
    large[:, 100:] //= 4
    shown = Pictures.of(list(large), network.config)
    asked = [Instruction(task="detection", classes=NAMES)] * 3
    closer = network.find(shown.pixels, asked, **shown.beside)
    assert [one.shape for one in shown.beside["originals"]] == [(200, 300, 3)] * 3
    assert [
        one is large[k] or np.array_equal(one, large[k])
        for k, one in zip((0, 2), shown.rows([0, 2]).originals, strict=True)
    ]
    for found, detections in zip(model.detect(list(large), NAMES, threshold=0), closer, strict=True):
        assert np.allclose(found.boxes.scores, detections.scores, atol=1e-5)
    rows = shown.rows([2])
    assert torch.allclose(
        network.find(rows.pixels, asked[:1], **rows.beside)[0].scores, closer[2].scores, atol=1e-5
    )
    plain = network.find(shown.pixels, asked)
    assert not torch.allclose(plain[0].scores, closer[0].scores, atol=1e-5)
    (groups,) = find_groups(network, rows.pixels, asked[:1], **rows.beside)
    (without,) = find_groups(network, rows.pixels, asked[:1])
    assert not torch.allclose(groups.probabilities, without.probabilities, atol=1e-5)
    with pytest.raises(ValueError, match="3 images but 2 originals"):
        network.find(shown.pixels, asked, originals=list(large[:2]))
    with pytest.raises(ValueError, match="3 images but 1 originals"):
        next(find_groups(network, shown.pixels, asked[:1], originals=list(large[:1])))
    assert Pictures.of(list(large), replace(network.config, classifier_names=())).beside == {}


def test_nothing_is_read_where_no_listed_name_is_known(monkeypatch):
    network = photos_only(classified())
    monkeypatch.setattr(network.image_tokenizer.classifier, "cells", None)  # calling it would fail
    asked = [Instruction(task="detection", classes=("unicorn",))]
    with torch.no_grad():
        _, _, tokens = network.see("find", pictures(1), asked, ("detection",), None, [pictures(1)[0].numpy()])
    assert tokens.pretrained_c5 is not None and tokens.called is None


@pytest.mark.parametrize(
    ("task", "changes", "expected"),
    [
        ("grounding", {"noun_power": 0.5}, True),
        ("grounding", {}, False),
        ("captioning", {"word_layers": 1}, True),
        ("vqa", {"word_layers": 1}, True),
        ("captioning", {}, False),
        ("segmentation", {"noun_power": 0.5, "word_layers": 1}, False),
    ],
)
def test_any_known_name_may_be_meant_where_none_is_listed(task, changes, expected):
    network = photos_only(classified(tasks=TASKS, **changes))
    network.known_names = ("apple", "cat")
    asked = {
        "grounding": Instruction(task="grounding", classes=("the red unicorn",)),
        "segmentation": Instruction(task="segmentation", classes=("unicorn",), points=8),
        "captioning": Instruction(task="captioning"),
        "vqa": Instruction(task="vqa", question="What is it?"),
    }[task]
    with torch.no_grad():
        _, _, tokens = network.see("test", pictures(1), [asked], (task,))
    assert (tokens.called is not None) == expected


def test_every_way_to_the_network_hands_the_pictures_on(monkeypatch):
    network = photos_only(classified(word_layers=1, tasks=TASKS))
    network.known_names = NAMES
    looks = list[tuple[int, ...]]()
    look = PhotoClassifier.look
    monkeypatch.setattr(
        PhotoClassifier,
        "look",
        lambda self, trunk, photo, boxes: looks.append(photo.shape) or look(self, trunk, photo, boxes),
    )
    photo = np.zeros((50, 70, 3), np.uint8)
    model = VisionLLM(network)
    model.caption(photo, options=TextOptions(max_tokens=1))
    model.segment(photo, NAMES, points=8)
    shown = Pictures.of([photo], network.config)
    detect_in_groups(network, shown.pixels, [Instruction(classes=NAMES)], **shown.beside)
    samples = [
        Sample(
            photo,
            np.array([[1, 2, 30, 40]], np.float32),
            ["cat"],
            np.ones(1, np.float32),
            np.zeros(1, bool),
            1,
            NAMES,
        )
    ]
    one = ValidationSet("photos", samples, 1, None, network.config.image_size, keep_originals=True)
    calibrate.candidates(network, one)
    assert looks == [(50, 70, 3)] * 4


def test_in_bfloat16():
    network = photos_only(enlivened(classified(word_layers=1, tasks=TASKS)))
    network.known_names = NAMES
    photo = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    model = VisionLLM(network, torch.bfloat16)
    model.caption(photo, options=TextOptions(max_tokens=2))
    assert np.isfinite(model.detect(photo, NAMES, threshold=0).boxes.scores).all()
    cells, boxes = torch.rand(1, CHANNELS, 6, 6), torch.rand(1, 8, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        narrow = network.image_tokenizer.classifier.from_afar(cells, boxes)
    with torch.no_grad():
        wide = network.image_tokenizer.classifier.from_afar(cells, boxes)
    for one, other in zip(narrow, wide, strict=True):
        assert torch.equal(one, other)  # means stay in fp32


def test_a_compiled_tokenizer_keeps_its_classifier():
    network = photos_only(classified())
    asked = [Instruction(task="detection", classes=NAMES)]
    expected = network.find(pictures(1), asked)[0].scores
    network.image_tokenizer = torch.compile(network.image_tokenizer, backend="eager")
    assert torch.allclose(network.find(pictures(1), asked)[0].scores, expected, atol=1e-5)
    network.image_tokenizer.classifier.rows.weight.data.zero_()
    assert not torch.allclose(network.find(pictures(1), asked)[0].scores, expected, atol=1e-5)


def test_it_does_not_train():
    network = classified()
    assert not any(p.requires_grad for p in network.image_tokenizer.classifier.parameters())
    network.train()
    prompts, text = network.asked([Instruction(task="detection", classes=NAMES)])
    assert network.image_tokens(pictures(1), text).called is None


def test_a_folder_keeps_it_and_16_bits_round_published_weights(tmp_path):
    network = classified()
    network.save_pretrained(tmp_path / "whole")
    whole = Network.from_pretrained(tmp_path / "whole")
    assert whole.config.classifier_names == NAMES
    for name, tensor in network.state_dict().items():
        assert torch.equal(whole.state_dict()[name], tensor), name
    network.save_pretrained(tmp_path / "narrow", torch.bfloat16)
    narrow = Network.from_pretrained(tmp_path / "narrow")
    before = network.image_tokenizer.classifier.classes.weight
    after = narrow.image_tokenizer.classifier.classes.weight
    step = before.abs().amax(1, keepdim=True) / 127
    assert ((after - before).abs() <= step / 2 * 1.001).all() and not torch.equal(after, before)
    narrow.save_pretrained(tmp_path / "again", torch.bfloat16)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("narrow", "again")]
    assert files[0] == files[1]
    assert len(files[0]) < 0.45 * (tmp_path / "whole" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_pretrained": False}, "classifier_names must be \\(\\) without keep_pretrained"),
        ({"classifier_names": ("dog", "Dog")}, "different names"),
        ({"classifier_names": ("dog", " ")}, "different names"),
        ({"classifier_names": (3,)}, "classifier_names must be names"),
        ({"classifier_power": 1.5}, r"classifier_power must be in \[0, 1\]"),
    ],
)
def test_configurations_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(ModelConfig(keep_pretrained=True, classifier_names=NAMES), **changes)


def test_imagenet_classes_bear_everyday_names():
    members = fitting.imagenet_members(NAMES)
    assert (members == 1).sum() == 118 and members[151] == members[268] == 1  # dogs
    assert (members == 2).sum() == 5 and (members == 0).sum() == 3
    assert (members == 3).sum() == CLASSES - 126
    assert (fitting.imagenet_members(("DOG",)) == 0).sum() == 118


def test_a_broken_list_of_imagenet_names_is_named(monkeypatch, tmp_path):
    (tmp_path / "imagenet_names.txt").write_text("# comment\ndog: 1-3\ncat: 3\n")
    monkeypatch.setattr(fitting.resources, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match="line 3: expected a new class, got 3"):
        fitting.imagenet_members(NAMES)


def test_rows_learn_what_imagenet_leaves_open():
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (400,), generator=rng)
    features = torch.randn(400, 30, generator=rng)
    features[:, 0] += 6.0 * (labels == 0)
    told = torch.full((400, 4), -3.0)
    told[labels == 1, 1] = 3.0
    features[:, 1] += 6.0 * (labels == 2)
    weight, bias = fitting.regression(features, told, labels)
    assert weight.shape == (4, 30) and bias.shape == (4,)
    logits = features @ weight.T + bias + told
    assert (logits.argmax(1) == labels).float().mean() > 0.95
    # What is told already need not be learned.
    assert weight[1].norm() < weight[0].norm()


def test_each_fold_is_named_by_what_the_others_taught():
    classifier = classified().image_tokenizer.classifier
    rng = torch.Generator().manual_seed(0)
    photo = torch.arange(200) // 4
    labels = torch.randint(0, 4, (200,), generator=rng)
    features = torch.rand(200, sum(PARTS), generator=rng)
    known = features.clone()
    known[:, :40] += 3.0 * F.one_hot(labels, 4).repeat(1, 10)
    boxes = fitting.PhotoBoxes(known, labels, photo, photo % 2 == 0)
    found = fitting.cross_validated(classifier, boxes)
    assert found["rows"] > 0.95 and found["both"] > 0.95 and found["ImageNet"] < 0.5
    # What nothing but the boxes themselves could teach is not known.
    found = fitting.cross_validated(classifier, fitting.PhotoBoxes(features, labels, photo, photo % 2 == 0))
    assert found["rows"] < 0.5


def test_average_precision_of_a_ranking():
    right = torch.tensor([True, False, True, False])
    assert fitting.average_precision(torch.tensor([4.0, 3, 2, 1]), right) == pytest.approx((1 + 2 / 3) / 2)
    assert fitting.average_precision(torch.tensor([1.0, 2, 3, 4]), right) == pytest.approx(
        (1 / 2 + 2 / 4) / 2
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Sixteen photos of one large object each, red dogs and blue cats, and the file that says so."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
    }
    rng = np.random.default_rng(0)
    for index in range(16):
        picture = rng.integers(0, 60, (64, 64, 3), np.uint8)
        x, y, side = (int(v) for v in rng.integers((2, 2, 24), (16, 16, 40)))
        picture[y : y + side, x : x + side, 2 * (index % 2)] = 250
        Image.fromarray(picture).save(folder / f"{index}.png")
        content["images"].append({"id": index, "file_name": f"{index}.png", "width": 64, "height": 64})
        content["annotations"].append(
            {
                "id": index + 1,
                "image_id": index,
                "category_id": 1 + index % 2,
                "bbox": [x, y, side, side],
                "area": side * side,
                "iscrowd": 0,
                "segmentation": [[x, y, x + side, y, x + side, y + side, x, y + side]],
            }
        )
    (folder / "photos.json").write_text(json.dumps(content))
    return folder


def test_a_network_is_given_a_classifier(photos, monkeypatch):
    monkeypatch.setattr(fitting, "DECAY", 1e-3)  # few boxes, and told by ImageNet's classes at random
    network = enlivened(small_network(keep_pretrained=True))
    data = CocoDataset(photos / "photos.json", photos)
    classifier, boxes = fitting.add_classifier(network, data, published_state())
    assert network.config.classifier_names == ("dog", "cat")
    assert network.image_tokenizer.classifier is classifier
    with torch.no_grad():
        logits = classifier.rows(boxes.features) + fitting.told_by_imagenet(classifier, boxes.features)
    there = boxes.labels < 2
    assert there.sum() >= 60 and (~there).sum() >= 30
    assert (logits[there, :2].argmax(1) == boxes.labels[there]).float().mean() > 0.9
    assert boxes.whole.sum() >= 16 and boxes.photo.max() == 15
    again = enlivened(small_network(keep_pretrained=True))
    fitting.add_classifier(again, data, published_state())
    assert torch.equal(again.image_tokenizer.classifier.rows.weight, classifier.rows.weight)
    found = fitting.cross_validated(classifier, boxes)
    assert found["both"] > 1.5 * found["ImageNet"] > 0  # a random trunk, photos never seen
    # The names' rows were fitted with a closer look at most boxes, but not at all of them.
    views = boxes.features[~boxes.whole]
    same = (views[:, :CHANNELS] == views[:, CHANNELS : 2 * CHANNELS]).all(1).float().mean()
    assert (
        0.05 < same < 0.5
        and not (
            boxes.features[boxes.whole, :CHANNELS] == boxes.features[boxes.whole, CHANNELS : 2 * CHANNELS]
        )
        .all(1)
        .any()
    )
    assert found["both, from afar"] > found["ImageNet"] and found["both, from afar"] != found["both"]
    afar = replace(
        boxes,
        features=torch.cat([boxes.features[:, CHANNELS : 2 * CHANNELS], boxes.features[:, CHANNELS:]], 1),
    )
    assert fitting.cross_validated(classifier, afar)["ImageNet"] != found["ImageNet"]


def test_photos_without_objects_are_refused(photos):
    data = CocoDataset(photos / "photos.json", photos)
    data.objects = [[] for _ in data.objects]
    network = small_network(keep_pretrained=True)
    with pytest.raises(ValueError, match="photos: expected objects called dog, cat"):
        fitting.add_classifier(network, data, published_state())
    assert network.config.classifier_names == () and network.image_tokenizer.classifier is None


def test_the_command_measures(photos, tmp_path, capsys):
    small_network(keep_pretrained=True).save_pretrained(tmp_path / "model")
    torch.save(published_state(), tmp_path / "state.pth")
    files = ["--annotations", str(photos / "photos.json"), "--images", str(photos)]
    options = ["--model", str(tmp_path / "model"), "--classifier", str(tmp_path / "state.pth")]
    assert fitting.main([*files, *options]) == 0
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()] == [
        "rows",
        "ImageNet",
        "both",
        "both, from afar",
    ]


def test_calibration_gives_a_classifier(photos, tmp_path):
    small_network(keep_pretrained=True).save_pretrained(tmp_path / "model")
    torch.save(published_state(), tmp_path / "state.pth")
    files = ["--annotations", str(photos / "photos.json"), "--images", str(photos)]
    options = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--count", "2"]
    assert calibrate.main([*files, *options, "--classifier", str(tmp_path / "state.pth")]) == 0
    found = Network.from_pretrained(tmp_path / "out")
    assert found.config.classifier_names == ("dog", "cat") and found.image_tokenizer.classifier is not None
    with pytest.raises(SystemExit):
        calibrate.main([*options, "--classifier", "imagenet"])
