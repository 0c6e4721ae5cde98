"""Matching against brute force; the losses of a network that knows all answers, and of one with none."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_network import (
    SMALL,
    keypoints_batch,
    outlines_batch,
    small_network,
    text_batch,
    train_batch,
    two_pictures,
)

from visionllm.instruction.instruction import TASKS
from visionllm.model.boxes import cxcywh_to_xyxy, overlap
from visionllm.model.image_tokenizer import ImageTokens, anchor_boxes
from visionllm.model.slots import (
    BINS_PER_UNIT,
    LOCATION_SIGMA,
    SlotFormat,
    SlotLogits,
    SlotReading,
    location_loss,
)
from visionllm.train import losses
from visionllm.train.losses import Targets, noised, set_loss, token_loss
from visionllm.train.matcher import PROPOSALS_PER_OBJECT, match, match_proposals, pair_costs

SURE = 30.0  # a logit that leaves no doubt
TERMS = ("proposals", "tokens", "denoising", "class", "location", "alignment")


# Matching


@pytest.mark.parametrize(("queries", "objects"), [(4, 3), (5, 1), (3, 3), (3, 5), (4, 0)])
def test_matching_is_optimal(queries, objects):
    generator = torch.Generator().manual_seed(queries * 10 + objects)
    cost = torch.randn(4, queries, objects, generator=generator)
    counts = torch.tensor([objects, max(0, objects - 1), 0, objects])
    valid = torch.arange(objects) < counts[:, None]
    found = match(cost, valid)
    assert found.shape == (4, queries) and found.dtype == torch.int64
    for b, count in enumerate(counts.tolist()):
        pairs = [(q, n) for q, n in enumerate(found[b].tolist()) if n >= 0]
        assert len(pairs) == min(count, queries) == len({n for _, n in pairs})
        assert all(n < count for _, n in pairs)
        rows = cost[b, :, :count]
        if count <= queries:
            choices = (
                list(zip(p, range(count), strict=True)) for p in itertools.permutations(range(queries), count)
            )
        else:
            choices = (list(enumerate(p)) for p in itertools.permutations(range(count), queries))
        best = min(sum(rows[q, n].item() for q, n in choice) for choice in choices)
        assert sum(rows[q, n].item() for q, n in pairs) == pytest.approx(best, abs=1e-5)


def test_a_cost_that_is_not_finite_is_avoided():
    cost = torch.tensor([[[math.nan, 1.0], [2.0, math.inf], [3.0, -math.inf]]])
    assert match(cost, torch.ones(1, 2, dtype=torch.bool)).tolist() == [[1, 0, -1]]


def test_pair_costs_fall_with_overlap_and_objectness():
    boxes = torch.tensor(
        [[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.45, 0.5, 0.2, 0.2], [0.9, 0.1, 0.2, 0.2]]]
    )
    cost = pair_costs(boxes, torch.tensor([[2.0, -2.0, -2.0, -2.0]]), boxes[:, :1])[0, :, 0]
    assert (cost.diff() > 0).all()
    p = torch.tensor(2.0).sigmoid().item()
    focal = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
    assert cost[0].item() == pytest.approx(
        2 * focal - 2, abs=1e-4
    )  # Deformable DETR's: class 2, L1 5, GIoU 2


def test_proposals_take_their_cheapest_positions():
    centres = anchor_boxes(torch.tensor([[4, 4]]))[:, :2]
    generator = torch.Generator().manual_seed(0)
    boxes = torch.cat([centres, torch.full((16, 2), 0.3)], 1)[None]
    objectness = torch.randn(1, 16, generator=generator)
    targets = torch.tensor([[[0.25, 0.25, 0.6, 0.6], [0.75, 0.75, 0.05, 0.05], [0.5, 0.5, 1.0, 1.0]]])
    valid = torch.tensor([[True, True, False]])
    found = match_proposals(boxes, objectness, centres, targets, valid)[0]
    cost = pair_costs(boxes, objectness, targets)[0]
    inside = ((centres[:, None] - targets[0, :, :2]).abs() <= targets[0, :, 2:] / 2).all(-1)
    for n, positions in enumerate(
        (inside[:, 0].nonzero().flatten(), torch.arange(16))
    ):  # none lie inside object 1
        cheapest = positions[cost[positions, n].argsort()[:PROPOSALS_PER_OBJECT]]
        mine = (found == n).nonzero().flatten()
        assert set(mine.tolist()) <= set(cheapest.tolist())
        for q in set(cheapest.tolist()) - set(mine.tolist()):
            assert found[q] >= 0  # only another object may take one away
    assert 2 not in found and (found == 0).any() and (found == 1).any()
    assert (match_proposals(boxes, objectness, centres, targets[:, :0], valid[:, :0]) == -1).all()


# Single terms


def test_location_loss_of_the_right_answer_is_the_entropy_of_its_smoothing():
    bins = torch.arange(1025) - BINS_PER_UNIT
    offsets, weight = torch.tensor([[0.0, -100.25, 511.5, -512.0]]), torch.full((1, 4), 0.25)
    density = torch.exp(-((bins - offsets[..., None]) ** 2) / (2 * LOCATION_SIGMA**2))
    p = density / density.sum(-1, keepdim=True)
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1).mean().item()
    logits = density.clamp(min=1e-30).log().requires_grad_()
    right = location_loss(logits, offsets, weight)
    assert right.item() == pytest.approx(entropy, abs=1e-4)
    right.backward()
    assert logits.grad.abs().max() < 1e-5
    assert location_loss(logits.detach().roll(1, -1), offsets, weight).item() > entropy + 0.1
    assert location_loss(torch.zeros(1, 4, 1025), offsets, weight).item() == pytest.approx(
        math.log(1025), abs=1e-3
    )


def test_offsets_beyond_the_tokens_are_taken_as_the_last():
    logits = torch.randn(1, 4, 1025, generator=torch.Generator().manual_seed(0))
    beyond, last = (
        location_loss(logits, torch.full((1, 4), value), torch.ones(1, 4)) for value in (9000.0, 512.0)
    )
    assert torch.equal(beyond, last)


def test_token_loss_by_hand():
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]]])
    logits = torch.tensor([[1.0, -1.0, 2.0]])
    target = torch.tensor([[[0.55, 0.5, 0.2, 0.2]]])
    weight = torch.tensor([[1.0, 1.0, 0.0]])  # the third one is not asked
    found = token_loss(boxes, logits, torch.tensor([[0, -1, -1]]), target, weight).item()
    iou = 0.15 / 0.25  # both boxes have the same height, so hull and union are equal

    def bce(logit, wanted):
        p = 1 / (1 + math.exp(-logit))
        return -wanted * math.log(p) - (1 - wanted) * math.log(1 - p)

    p = 1 / (1 + math.exp(1.0))
    objectness = iou * bce(1.0, iou) + 0.75 * p**2 * bce(-1.0, 0.0)
    expected = (
        losses.OBJECTNESS_WEIGHT * objectness
        + losses.CENTRE_WEIGHT * 0.05
        + losses.BOX_WEIGHT * 0.05
        + losses.GIOU_WEIGHT * (1 - iou)
    )
    assert found == pytest.approx(expected, abs=1e-5)


def test_areas_to_ignore():
    batch = two_pictures()
    targets = Targets.from_batch(batch, torch.device("cpu"))
    boxes = torch.tensor(
        [[0.8, 0.2, 0.1, 0.1], [0.64, 0.2, 0.9, 0.9], [0.66, 0.34, 0.1, 0.1], [0.0, 0.0, 1.0, 1.0]]
    )
    outside = losses.outside_ignored(boxes.expand(2, -1, -1), targets)
    assert outside.tolist() == [[True] * 4, [False, True, False, True]]


def test_noise_keeps_near():
    torch.manual_seed(0)
    boxes = torch.tensor([[0.5, 0.4, 0.2, 0.1]]).expand(1, 2000, 4)
    moved = noised(boxes)
    assert ((moved - boxes)[..., :2].abs() <= boxes[..., 2:] * losses.NOISE / 2 + 1e-6).all()
    assert ((moved / boxes)[..., 2:] - 1).abs().max() <= losses.NOISE + 1e-6
    assert moved.std(1).min() > 0.01
    iou, _ = overlap(cxcywh_to_xyxy(moved), cxcywh_to_xyxy(boxes))
    assert iou.min() > 0.3
    assert noised(torch.zeros(1, 3, 4)).min() > 0  # padding stays a box


def test_targets_are_padded():
    targets = Targets.from_batch(two_pictures(), torch.device("cpu"))
    assert targets.valid.tolist() == [[True, True], [True, False]]
    assert targets.labels.tolist() == [[0, 2], [1, 0]]
    assert targets.ignore_valid.tolist() == [[False], [True]]
    torch.testing.assert_close(targets.boxes[0, 1], torch.tensor([0.7, 0.6, 0.4, 0.5]))


# A network that knows the answers


class Oracle:
    """Answers like a network that has learned everything; each argument makes it wrong in one way.

    Args:
        shift: moves the boxes of the image tokens to the right by this share of the picture.
        wrong_class: says the next class instead.
        extra: a confident answer (class 0) with this box on every picture, where nothing is asked for.
    """

    def __init__(self, batch, shift=0.0, wrong_class=False, extra=None) -> None:
        self.real = small_network()
        self.known_names = ()
        self.config, self.device, self.tokenizer = SMALL, torch.device("cpu"), self.real.tokenizer
        self.encode_text, self.encode_names, self.alignment = (
            self.real.encode_text,
            self.real.encode_names,
            self.real.alignment,
        )
        self.targets = Targets.from_batch(batch, self.device)
        self.shift, self.wrong_class, self.extra = shift, wrong_class, extra
        listed = self.targets.boxes.shape[1]
        self.listed = listed
        unlisted, _ = losses.pad_boxes(batch.unlisted, self.device)
        spare = (
            torch.tensor([0.05, 0.95, 0.02, 0.02])
            .expand(len(unlisted), SMALL.num_queries - listed, 4)
            .clone()
        )
        if extra is not None:
            spare[:, 0] = torch.tensor(extra)
        padding = torch.tensor([0.05, 0.95, 0.02, 0.02])
        own = torch.where(self.targets.valid[..., None], self.targets.boxes, padding)
        self.truth = torch.cat([own, spare, self.targets.boxes, unlisted], 1)  # [B, M + D, 4]
        known = torch.zeros(self.truth.shape[:2], dtype=torch.bool)
        known[:, :listed] = self.targets.valid
        known[:, SMALL.num_queries : SMALL.num_queries + listed] = self.targets.valid
        if extra is not None:
            known[:, listed] = True
        self.known = known  # where it says that there is an object

    def image_tokens(self, images, _text, queries, _drawings):
        assert queries.boxes.shape[1] == self.truth.shape[1] - SMALL.num_queries
        boxes = self.truth.clone()
        boxes[:, : self.listed, 0] += self.shift
        logits = torch.where(self.known, SURE, -SURE)
        features = torch.zeros(*boxes.shape[:2], SMALL.dim)
        positions = anchor_boxes(torch.tensor([[8, 8], [4, 4], [2, 2], [1, 1]]))
        s = len(positions)
        memory, proposals = torch.zeros(len(boxes), s, SMALL.dim), positions.expand(len(boxes), -1, -1)
        return ImageTokens(
            features, [boxes] * 2, [logits] * 2, memory, proposals, torch.full((len(boxes), s), -SURE)
        )

    def slot_format(self, _instructions):
        return SlotFormat()

    def read_slots(self, prompts, _text, tokens, groups, _wanted):
        at = torch.arange(len(groups))[:, None]
        centres = tokens.boxes[-1][at, groups]
        classes = torch.full((*groups.shape, prompts.class_mask.shape[1] + 1), -SURE)
        labels = torch.zeros(self.truth.shape[:2], dtype=torch.int64)
        for start in (0, SMALL.num_queries):
            labels[:, start : start + self.listed] = self.targets.labels
        labels = (labels + self.wrong_class) % prompts.class_mask.shape[1]
        labels = torch.where(self.known, labels, classes.shape[-1] - 1)
        classes.scatter_(2, labels[at, groups][..., None], SURE)
        corners = cxcywh_to_xyxy(self.truth[at, groups])
        offsets = (corners - centres[..., :2].repeat(1, 1, 2)) * BINS_PER_UNIT
        bins = torch.arange(1025) - BINS_PER_UNIT
        states = torch.zeros(*groups.shape, 5, SMALL.llm_dim)
        rows = torch.zeros(*prompts.class_mask.shape, SMALL.llm_dim)
        reading = SlotReading(self.real.slot_head, states, rows, prompts.class_mask, centres)
        reading.by_operator = False  # read from these logits
        reading.logits = SlotLogits(classes, -((bins - offsets[..., None]) ** 2) / (2 * LOCATION_SIGMA**2))
        return reading


@torch.no_grad()
def answers(batch, **wrong):
    found = set_loss(Oracle(batch, **wrong), batch)
    assert set(TERMS) <= found.keys()
    assert found["total"].item() == pytest.approx(sum(found[name].item() for name in TERMS), rel=1e-5)
    return {name: value.item() for name, value in found.items()}


ENTROPY = 0.5 * math.log(2 * math.pi * math.e * LOCATION_SIGMA**2)


def test_the_right_answers_cost_nothing():
    found = answers(two_pictures())
    for name in ("tokens", "denoising", "class"):
        assert found[name] == pytest.approx(0, abs=1e-4), name
    assert found["location"] == pytest.approx(losses.LOCATION_WEIGHT * ENTROPY, abs=1e-3)
    assert found["metric/class_accuracy"] == 1 and found["metric/iou"] == pytest.approx(1, abs=1e-3)


def test_a_shifted_box_costs_its_distance():
    found = answers(two_pictures(), shift=0.03)
    giou = [(w - 0.03) / (w + 0.03) for w in (0.3, 0.4, 0.6)]  # the hull is the union
    each = (losses.CENTRE_WEIGHT + losses.BOX_WEIGHT) * 0.03 + losses.GIOU_WEIGHT * (1 - np.mean(giou))
    objectness = np.mean([g * (1 - g) * SURE for g in giou])  # sure of a box that is only so good
    layers = SMALL.decoder_layers
    assert found["tokens"] == pytest.approx(layers * (each + losses.OBJECTNESS_WEIGHT * objectness), rel=1e-3)
    # The slots' offsets make up for it.
    assert found["location"] == pytest.approx(losses.LOCATION_WEIGHT * ENTROPY, abs=1e-3)
    assert found["class"] == pytest.approx(0, abs=1e-4)


def test_a_wrong_class_is_expensive():
    found = answers(two_pictures(), wrong_class=True)
    assert found["class"] > losses.CLASS_WEIGHT * 0.5 * SURE
    assert found["metric/class_accuracy"] == 0 and found["tokens"] == pytest.approx(0, abs=1e-4)


def test_an_answer_in_an_area_to_ignore_costs_nothing():
    inside, outside = (0.8, 0.2, 0.1, 0.1), (0.2, 0.8, 0.1, 0.1)
    batch = train_batch(
        [[[0.5, 0.5, 0.2, 0.2]]], [[1]], ignore=[[[0.8, 0.2, 0.3, 0.3]]], unlisted=[[[0.1, 0.1, 0.1, 0.1]]]
    )
    ignored, counted = answers(batch, extra=inside), answers(batch, extra=outside)
    for name in ("tokens", "class"):
        assert ignored[name] == pytest.approx(0, abs=1e-4), name
        assert counted[name] > 1, name


def test_an_answer_on_an_unlisted_object_costs_most():
    batch = train_batch([[[0.5, 0.5, 0.2, 0.2]]], [[1]], unlisted=[[[0.1, 0.1, 0.1, 0.1]]])
    on_it, elsewhere = answers(batch, extra=(0.1, 0.1, 0.1, 0.1)), answers(batch, extra=(0.2, 0.8, 0.1, 0.1))
    assert on_it["class"] >= elsewhere["class"] > 1
    assert on_it["tokens"] > elsewhere["tokens"] > 1


# A network that knows nothing


def boxes_of(count: int, seed: int) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.random((count, 2)), rng.uniform(1e-3, 1, (count, 2))]).tolist()


BATCHES = {
    "ordinary": two_pictures,
    "no objects": lambda: train_batch([[], []], [[], []]),
    "only absent classes": lambda: train_batch([[], []], [[], []], unlisted=[boxes_of(2, 0), boxes_of(1, 1)]),
    "only areas to ignore": lambda: train_batch([[]], [[]], ignore=[[[0.5, 0.5, 1.0, 1.0]]]),
    "one picture without": lambda: train_batch([boxes_of(2, 2), []], [[0, 1], []]),
    "more objects than queries": lambda: train_batch([boxes_of(30, 3)], [[i % 3 for i in range(30)]]),
    "many unlisted": lambda: train_batch([boxes_of(1, 4)], [[0]], unlisted=[boxes_of(20, 5)]),
    "one class": lambda: train_batch([boxes_of(3, 6)], [[0, 0, 0]], classes=("cup",)),
    "whole picture": lambda: train_batch([[[0.5, 0.5, 1.0, 1.0]]], [[0]]),
    "a point": lambda: train_batch([[[1.0, 1.0, 0.0, 0.0]]], [[0]]),
    "twice the same": lambda: train_batch([[[0.5, 0.5, 0.3, 0.3]] * 2], [[0, 1]]),
    "outlines": outlines_batch,
    "long outlines": lambda: outlines_batch(64),
    "keypoints": keypoints_batch,
    "no keypoint is labelled": lambda: without_points(keypoints_batch()),
}


def without_points(batch):
    return replace(batch, visibility=[np.zeros_like(flags) for flags in batch.visibility])


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_losses_are_finite(network, case, autocast):
    torch.manual_seed(0)
    batch = BATCHES[case]()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = network.loss(batch)
    gradients = torch.autograd.grad(
        found["total"], [p for p in network.parameters() if p.requires_grad], allow_unused=True
    )
    assert all(torch.isfinite(value) and value.ndim == 0 for value in found.values()), found
    assert all(not value.requires_grad for name, value in found.items() if name.startswith("metric/"))
    for (name, _), gradient in zip(
        ((n, p) for n, p in network.named_parameters() if p.requires_grad), gradients, strict=True
    ):
        assert gradient is None or torch.isfinite(gradient).all(), name
    if not any(map(len, batch.boxes)):
        assert found["location"] == 0 and "metric/iou" not in found
        asked = case != "only areas to ignore"
        assert (found["tokens"] > 0) == asked and (found["class"] > 0) == asked


def test_a_keypoint_that_is_not_labelled_costs_nothing():
    """Wherever it is said to be, the location loss is that of the labelled ones."""
    network = small_network(tasks=TASKS)
    batch = keypoints_batch()
    moved = replace(
        batch,
        points=[
            np.where((flags > 0)[..., None], places, np.float32(0.9))
            for places, flags in zip(batch.points, batch.visibility, strict=True)
        ],
    )
    assert not all(map(np.array_equal, batch.points, moved.points))
    with torch.no_grad():
        found = []
        for one in (batch, moved, without_points(batch)):
            torch.manual_seed(0)
            found.append(network.loss(one))
    assert found[0]["location"] == found[1]["location"] > 0
    assert found[0]["visibility"] == found[1]["visibility"] > 0
    assert found[2]["location"] == 0 and found[2]["visibility"] > 0  # that nothing is labelled is learned too


def test_naming_by_hand():
    """The mean over known objects of the mean over their names' pieces of minus the log-probability."""
    network = small_network(tasks=TASKS)
    batch = two_pictures()
    with torch.no_grad():
        prompts = network.tokenizer.prompts(batch.instructions, SMALL.num_queries)
        tokens = network.image_tokens(torch.from_numpy(batch.images), network.encode_text(prompts))
        of_query = torch.full((2, SMALL.num_queries), -1)
        of_query[0, 3], of_query[1, 0] = 1, 0
        names = ["dog", "teddy bear"]
        given = network.slot_queries.image_tokens(tokens.features, tokens.boxes[-1], tokens.objectness[-1])
        pieces = network.embedding.weight[: network.tokenizer.vocab_size]
        expected = 0.0
        for (b, m), name in (((0, 3), "teddy bear"), ((1, 0), "dog")):
            x = given[b, m] / (given[b, m].pow(2).mean() + torch.finfo(torch.float32).eps).sqrt()
            chances = network.text_head(x, pieces).log_softmax(-1)
            expected -= float(chances[torch.tensor(network.tokenizer.encode_name(name))].mean()) / 2
        found = losses.naming_loss(network, tokens, of_query, names)
        assert float(found) == pytest.approx(losses.NAMING_WEIGHT * expected, rel=1e-4)
        assert losses.naming_loss(network, tokens, torch.full_like(of_query, -1), names) == 0
    assert "naming" in network.loss(batch)
    assert "naming" not in small_network().loss(batch)  # where nothing is written


def test_other_places_cost_more():
    """Steps on one batch bring the points of outlines and keypoints to where they are."""
    for batch in (outlines_batch(), keypoints_batch()):
        torch.manual_seed(0)
        network = small_network(tasks=TASKS).train()
        optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-2)
        losses_ = []
        for _ in range(60):
            torch.manual_seed(0)
            optimizer.zero_grad()
            found = network.loss(batch)
            found["total"].backward()
            optimizer.step()
            losses_.append(float(found["location"].detach()))
        assert losses_[-1] < 0.8 * losses_[0], batch.task


@pytest.mark.parametrize("class_rows", ["names", "static"])
def test_every_trained_value_gets_a_gradient(class_rows):
    torch.manual_seed(0)
    network = small_network(
        tasks=TASKS, class_rows=class_rows, lora_targets=("q", "k", "v", "o", "gate", "up", "down")
    )
    format = [("Give me the corners.", "(c, x1, y1, x2, y2)")]
    for batch in (two_pictures(), outlines_batch(), keypoints_batch(), text_batch(formats=format)):
        network.loss(batch)["total"].backward()
    without = [
        name
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert without == []
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert frozen and all(".backbone." in name for name in frozen)


@pytest.mark.parametrize(
    "place", ["image_tokenizer.lateral.0.0.weight", "llm.norm.weight", "slot_head.no_object"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("case", ["ordinary", "no objects"])
def test_what_is_not_finite_shows_in_the_loss(place, value, case):
    network = small_network()
    with torch.no_grad():
        network.get_parameter(place).view(-1)[3] = value
    assert not torch.isfinite(network.loss(BATCHES[case]())["total"])


def test_the_optimizer_gets_every_trained_value_once():
    network = small_network()
    groups = network.parameter_groups(lr=1.0, backbone_lr=0.1, weight_decay=0.5)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    names = {id(p): name for name, p in network.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr"] == (0.1 if ".backbone." in name else 1.0), name
            if parameter.ndim < 2 or name in ("embedding.weight", "class_tokens.weight"):
                assert group["weight_decay"] == 0, name
            elif name.endswith("llm.layers.0.q.weight"):
                assert group["weight_decay"] == 0.5
