"""L = L_tok + L_dec (VisionLLM, App. B).

L_tok, on the image tokenizer, is category-agnostic: focal objectness and L1 on the centre, and beside the
paper's terms L1 and GIoU on the box, on every decoder layer and on the encoder's proposals. L_dec, on the
LLM's slots, is cross-entropy of the class and the coordinate tokens after bipartite matching, for boxes,
outlines and keypoints alike (words: text_loss.py). Denoising
queries (DINO, 2203.03605) give both parts more to learn from: near an object that is listed, its box and
class; near one that is not listed, silence. With pretrained stages of its own (`keep_pretrained`) the image
tokenizer also learns which pictures are drawings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visionllm.model.boxes import cxcywh_to_xyxy, overlap
from visionllm.model.config import STRIDES
from visionllm.model.image_tokenizer import DenoisingQueries, ImageTokens, anchor_boxes
from visionllm.model.slots import extent_of, points_of, units
from visionllm.tokenizer import PADDING
from visionllm.train.matcher import CLASS_COST, GIOU_COST, L1_COST, match, match_proposals, pair_costs

if TYPE_CHECKING:
    from visionllm.data.train_batch import TrainBatch
    from visionllm.model.network import Network, Text

OBJECTNESS_WEIGHT, CENTRE_WEIGHT, BOX_WEIGHT, GIOU_WEIGHT = 1.0, 2.5, 2.5, 2.0
CLASS_WEIGHT, LOCATION_WEIGHT, ALIGNMENT_WEIGHT, VISIBILITY_WEIGHT = 2.0, 1.0, 1.0, 0.2
NAMING_WEIGHT = 0.5
WRITTEN = frozenset(("captioning", "vqa"))  # tasks that are answered in words
# An unmatched group's weight in the class loss.
NO_OBJECT_WEIGHT = 0.2
# The same where an object stands whose class is not listed, and the factor on the objectness loss there:
# silence on it is harder to learn.
UNLISTED_WEIGHT = 2.0
# Unmatched image tokens that get a group of slots in training, beside the matched ones: the most object-like.
SPARE_GROUPS = 12
# The same for outlines and keypoints, whose groups are many times as long: boxes teach silence often enough.
SPARE_LONG_GROUPS = 4
# Denoising queries: at most this many per picture at listed and at unlisted objects; the centre moves by up
# to half of NOISE sizes, a side changes by up to a share NOISE.
MAX_DENOISING, MAX_UNLISTED, NOISE = 12, 6, 0.4


@dataclass(frozen=True)
class UnmatchedWeights:
    """Weights in the class loss of groups of slots without a listed object; a group with one has 1."""

    no_object: float = NO_OBJECT_WEIGHT
    unlisted: float = UNLISTED_WEIGHT  # where an object stands whose class is not listed


@dataclass
class Targets:
    """Padded objects of a batch.

    Attributes:
        boxes: [B, N, 4] cxcywh; labels: int64 [B, N]; valid: bool [B, N], where there is an object.
        ignore: [B, I, 4], areas to ignore; ignore_valid: bool [B, I].
        points: [B, N, P, 2], what the coordinate slots say, in shares of the picture; point_weight:
            [B, N, P], 1 where a point is known and 0 elsewhere.
        visibility: int64 [B, N, P], of keypoints.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    ignore: Tensor
    ignore_valid: Tensor
    points: Tensor
    point_weight: Tensor
    visibility: Tensor | None = None

    @classmethod
    def from_batch(cls, batch: TrainBatch, device: torch.device) -> Targets:
        boxes, valid = pad_boxes(batch.boxes, device)
        labels = torch.zeros(valid.shape, dtype=torch.int64)
        for b, row in enumerate(batch.labels):
            labels[b, : len(row)] = torch.from_numpy(np.asarray(row))
        ignore, ignore_valid = pad_boxes(batch.ignore, device)
        if batch.points is None:
            points = cxcywh_to_xyxy(boxes).unflatten(-1, (2, 2))
            weight, visibility = torch.ones_like(points[..., 0]), None
        else:
            points, weight = padded(batch.points, valid.shape[1]), torch.ones(())
            visibility = None
            if batch.visibility is not None:
                visibility = padded(batch.visibility, valid.shape[1])
                weight = (visibility > 0).float()
                visibility = visibility.to(device)
            weight = weight.expand(points.shape[:-1])
        return cls(
            boxes, labels.to(device), valid, ignore, ignore_valid,
            points.to(device), weight.to(device), visibility,
        )  # fmt: skip


def padded(rows: list[np.ndarray], count: int) -> Tensor:
    """B arrays [n, ...] with n ≤ count → [B, count, ...], zeros behind them."""
    out = torch.zeros(len(rows), count, *rows[0].shape[1:], dtype=torch.from_numpy(rows[0]).dtype)
    for b, row in enumerate(rows):
        out[b, : len(row)] = torch.from_numpy(row)
    return out


def pad_boxes(
    rows: list[np.ndarray], device: torch.device, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """B arrays [n, 4] → [B, longest, 4] and its mask."""
    rows = [row[:limit] for row in rows]
    boxes = torch.zeros(len(rows), max(map(len, rows)), 4)
    valid = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    for b, row in enumerate(rows):
        boxes[b, : len(row)] = torch.from_numpy(np.asarray(row, np.float32).reshape(-1, 4))
        valid[b, : len(row)] = True
    return boxes.to(device), valid.to(device)


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, N, ...], index [B, Q] (−1 reads row 0) → [B, Q, ...]."""
    return rows[torch.arange(len(rows), device=rows.device)[:, None], index.clamp(min=0)]


def objectness_loss(logits: Tensor, quality: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    """Focal loss whose positive target is the box's IoU (varifocal, 2008.13367); summed. All [B, Q]."""
    p = logits.sigmoid().detach()
    factor = torch.where(positive, quality.clamp(min=0.1), 0.75 * p**2)
    loss = F.binary_cross_entropy_with_logits(logits, torch.where(positive, quality, 0.0), reduction="none")
    return (factor * weight * loss).sum()


def token_loss(
    boxes: Tensor, objectness: Tensor, assigned: Tensor, targets: Tensor, weight: Tensor
) -> Tensor:
    """Objectness, centre, box and GIoU loss of one set of predictions, summed.

    Args:
        boxes, objectness: [B, Q, 4], [B, Q]; assigned: [B, Q], object or −1; targets: [B, N, 4].
        weight: [B, Q] on the objectness.
    """
    positive = assigned >= 0
    if targets.shape[1] == 0 or not positive.any():
        return OBJECTNESS_WEIGHT * objectness_loss(objectness, torch.zeros_like(objectness), positive, weight)
    wanted = gather_rows(targets, assigned)[positive]
    found = boxes[positive]
    iou, giou = overlap(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))
    quality = torch.zeros_like(objectness)
    quality[positive] = iou.detach()
    return (
        OBJECTNESS_WEIGHT * objectness_loss(objectness, quality, positive, weight)
        + CENTRE_WEIGHT * (found[:, :2] - wanted[:, :2]).abs().sum()
        + BOX_WEIGHT * (found - wanted).abs().sum()
        + GIOU_WEIGHT * (1 - giou).sum()
    )


def outside_ignored(boxes: Tensor, targets: Targets) -> Tensor:
    """bool [B, Q]: the box's centre lies in no area to ignore."""
    if targets.ignore.shape[1] == 0:
        return torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    distance = (boxes[:, :, None, :2] - targets.ignore[:, None, :, :2]).abs()
    inside = (distance < targets.ignore[:, None, :, 2:] / 2).all(-1) & targets.ignore_valid[:, None]
    return ~inside.any(-1)


def unlisted_at(corners: Tensor, unlisted: Tensor, valid: Tensor) -> Tensor:
    """int64 [B, Q]: which unlisted object [B, U, 4] (cxcywh) a box [B, Q, 4] (corners) lies on; −1: none."""
    if unlisted.shape[1] == 0:
        return torch.full(corners.shape[:2], -1, device=corners.device)
    iou, _ = overlap(corners[:, :, None], cxcywh_to_xyxy(unlisted)[:, None])
    most, which = iou.masked_fill(~valid[:, None], 0.0).max(-1)
    return torch.where(most > 0.5, which, -1)


def noised(boxes: Tensor) -> Tensor:
    """Boxes [B, N, 4] moved and scaled at random."""
    shift = (torch.rand_like(boxes[..., :2]) * 2 - 1) * boxes[..., 2:] * (NOISE / 2)
    scale = 1 + (torch.rand_like(boxes[..., 2:]) * 2 - 1) * NOISE
    return torch.cat([boxes[..., :2] + shift, boxes[..., 2:] * scale], -1).clamp(1e-3, 1)


def set_loss(
    network: Network, batch: TrainBatch, unmatched: UnmatchedWeights | None = None
) -> dict[str, Tensor]:
    """All terms of a task that is answered by a set of objects, weighted.

    "total" is their sum; "metric/…" entries are detached.
    """
    unmatched = unmatched or UnmatchedWeights()
    device = network.device
    m = network.config.num_queries
    targets = Targets.from_batch(batch, device)
    prompts = network.tokenizer.prompts(batch.instructions, m).to(device)
    text = network.encode_text(prompts)

    denoises = network.config.denoises
    listed = min(targets.boxes.shape[1], MAX_DENOISING) if denoises else 0
    unlisted, unlisted_valid = pad_boxes(batch.unlisted, device, MAX_UNLISTED)
    # [B, D, 4], what each denoising query stands at
    spare = unlisted.shape[1] if denoises else 0
    denoised = torch.cat([targets.boxes[:, :listed], unlisted[:, :spare]], 1)
    denoised_valid = torch.cat([targets.valid[:, :listed], unlisted_valid[:, :spare]], 1)
    extra = denoised.shape[1]
    queries = DenoisingQueries(noised(denoised)) if extra else None
    tokens = seen_in_training(network, batch, text, queries)

    losses: dict[str, Tensor] = {
        name: torch.zeros((), device=device)
        for name in ("proposals", "tokens", "denoising", "class", "location", "alignment")
    }
    objects = targets.valid.sum().clamp(min=1)
    with torch.no_grad():
        # Denoising query d stands for object d; those at unlisted objects must say nothing.
        own = torch.arange(extra, device=device).expand(len(denoised), -1)
        denoised_object = torch.where(denoised_valid & (own < listed), own, -1)
        denoised_weight = denoised_valid * torch.where(own < listed, 1.0, UNLISTED_WEIGHT)
    at_positions = None
    if tokens.proposal_boxes is not None:
        at_positions, found = proposal_loss(tokens, targets, batch.images.shape[1])
        losses["proposals"] = found / objects
    for boxes, objectness in zip(tokens.boxes[:-1], tokens.objectness[:-1], strict=True):
        with torch.no_grad():
            assigned = match(pair_costs(boxes[:, :m], objectness[:, :m], targets.boxes), targets.valid)
            weight = outside_ignored(boxes[:, :m], targets) | (assigned >= 0)
        losses["tokens"] += (
            token_loss(boxes[:, :m], objectness[:, :m], assigned, targets.boxes, weight) / objects
        )
    if extra:
        for boxes, objectness in zip(tokens.boxes, tokens.objectness, strict=True):
            losses["denoising"] += (
                token_loss(boxes[:, m:], objectness[:, m:], denoised_object, denoised, denoised_weight)
                / objects
            )

    # Slots of the matched image tokens, of the most object-like others, and of the denoising queries.
    with torch.no_grad():
        boxes, objectness = tokens.boxes[-1][:, :m], tokens.objectness[-1][:, :m]
        cost = pair_costs(boxes, objectness, targets.boxes)
        priority = objectness.sigmoid() + (match(cost, targets.valid) >= 0)
        spare_groups = SPARE_GROUPS if targets.points.shape[2] <= 2 else SPARE_LONG_GROUPS
        count = min(m, targets.boxes.shape[1] + spare_groups)
        chosen = priority.topk(count, dim=1).indices
        groups = torch.cat([chosen, m + own], 1)
    wanted = network.slot_format(batch.instructions)
    reading = network.read_slots(prompts, text, tokens, groups, wanted)
    answers = reading.answers(network.config.coordinate_window, count)

    with torch.no_grad():
        # What keypoints span is no box: the image token's own is compared.
        corners = (
            cxcywh_to_xyxy(reading.boxes[:, :count])
            if wanted.kind == "keypoints"
            else extent_of(points_of(answers.offsets, reading.boxes[:, :count]))
        )
        true_corners = cxcywh_to_xyxy(targets.boxes)
        _, giou = overlap(corners[:, :, None], true_corners[:, None])
        of_object = answers.probabilities.gather(2, targets.labels[:, None].expand(-1, count, -1))
        cost = gather_rows(cost, chosen) - CLASS_COST * of_object
        cost = cost + L1_COST * torch.cdist(corners, true_corners, p=1) - GIOU_COST * giou
        assigned = match(cost, targets.valid)  # [B, count]
        of_token = torch.full(objectness.shape, -1, device=device).scatter(1, chosen, assigned)
        weight = (outside_ignored(boxes, targets) | (of_token >= 0)).float()
        astray = unlisted_at(cxcywh_to_xyxy(boxes), unlisted, unlisted_valid)  # [B, M]
        astray = torch.where(of_token < 0, astray, -1)
        weight[astray >= 0] *= UNLISTED_WEIGHT
    losses["tokens"] += (
        token_loss(tokens.boxes[-1][:, :m], tokens.objectness[-1][:, :m], of_token, targets.boxes, weight)
        / objects
    )

    with torch.no_grad():
        of_group = torch.cat([assigned, denoised_object], 1)  # [B, count + D]
        positive = of_group >= 0
        no_object = answers.probabilities.shape[-1] - 1
        labels = (
            torch.where(positive, gather_rows(targets.labels, of_group), no_object)
            if targets.boxes.shape[1]
            else torch.full_like(of_group, no_object)
        )
        silent = torch.full_like(answers.probabilities[..., 0], unmatched.no_object)
        silent[unlisted_at(corners, unlisted, unlisted_valid) >= 0] = unmatched.unlisted
        silence = [(gather_rows(weight, chosen) > 0) * silent, denoised_valid * unmatched.unlisted]
        weights = torch.cat(silence, 1)
        weights = torch.where(positive, 1.0, weights)
    per_group = reading.class_loss(labels)
    losses["class"] = CLASS_WEIGHT * (per_group * weights).sum() / weights.sum().clamp(min=1e-6)
    if targets.boxes.shape[1]:
        offsets = gather_rows(targets.points, of_group) - reading.boxes[..., None, :2]  # [B, G, N, 2]
        counts = gather_rows(targets.point_weight, of_group) * positive[..., None]  # [B, G, N]
        found = reading.location_loss(
            (offsets * units(network.config.location_bins)).flatten(2), counts.repeat_interleave(2, -1)
        )
        losses["location"] = LOCATION_WEIGHT * found / (2 * counts.sum()).clamp(min=1)
        if targets.visibility is not None:
            logits = reading.visibility_logits()[positive]  # [n, N, 3]
            seen = gather_rows(targets.visibility, of_group)[positive]
            losses["visibility"] = VISIBILITY_WEIGHT * F.cross_entropy(logits.flatten(0, 1), seen.flatten())

    # Expressions are no names; and without text there are none.
    if batch.task != "grounding" and network.config.text_guidance:
        losses["alignment"], of_query, names = alignment_loss(
            network, batch, text, tokens, targets, at_positions, of_token, astray, listed
        )
        if not WRITTEN.isdisjoint(network.config.tasks):
            losses["naming"] = naming_loss(network, tokens, of_query, names)
    if tokens.drawing is not None:
        losses["router"] = router_loss(tokens.drawing, drawings_of(batch, device))
    result = dict(losses)
    result["total"] = torch.stack(list(result.values())).sum()
    with torch.no_grad():
        matched = assigned >= 0
        if matched.any():
            hit = answers.probabilities.argmax(-1) == labels[:, :count]
            iou, _ = overlap(corners[matched], gather_rows(true_corners, assigned)[matched])
            result["metric/class_accuracy"] = hit[matched].float().mean()
            result["metric/iou"] = iou.mean()
            result["metric/class_positive"] = per_group[:, :count][matched].mean()
    return result


def drawings_of(batch: TrainBatch, device: torch.device) -> Tensor:
    """bool [B], which pictures are no photos."""
    return ~torch.tensor(batch.photo, device=device)


def seen_in_training(
    network: Network, batch: TrainBatch, text: Text, queries: DenoisingQueries | None = None
) -> ImageTokens:
    """The image tokens of a batch's pictures."""
    device = network.device
    shapes = {} if batch.sizes is None else {"sizes": torch.from_numpy(batch.sizes)}
    images = torch.from_numpy(batch.images).to(device)
    return network.image_tokens(images, text, queries, drawings_of(batch, device), **shapes)


def router_loss(logits: Tensor, drawings: Tensor) -> Tensor:
    """Binary cross-entropy of "drawing": logits [B], drawings bool [B]."""
    return F.binary_cross_entropy_with_logits(logits, drawings.to(logits.dtype))


def alignment_loss(
    network: Network,
    batch: TrainBatch,
    text: Text,
    tokens: ImageTokens,
    targets: Targets,
    at_positions: Tensor | None,
    of_token: Tensor,
    astray: Tensor,
    listed: int,
) -> tuple[Tensor, Tensor, list[str]]:
    """Cross-entropy of the encoder's and decoder's features at known objects over all names.

    It asks for more than the slots do: every object, listed or not, against every name of the training data
    (`Network.known_names`; without those, every name of the batch). Without it, class slots stayed at chance
    for 300 steps on 469 names.

    Args:
        at_positions, of_token: [B, S], [B, M], the object that a position or image token stands for, or −1;
            at_positions None where the encoder makes no proposals.
        astray: [B, M], the unlisted object that an image token of no listed object lies on, or −1.
        listed: how many denoising queries stand at listed objects; those at unlisted ones follow.

    Returns:
        the loss; the name of every image token and denoising query, [B, M + D], a position in the names or
        −1; the names.
    """
    device = network.device
    # The same order as in Prompts.names, which text.distinct follows.
    row = {name: i for i, name in enumerate(dict.fromkeys(n for i in batch.instructions for n in i.classes))}
    others = [n for names in batch.unlisted_names for n in names]
    more = [name for name in dict.fromkeys([*others, *network.known_names]) if name not in row]
    names = text.distinct
    if more:
        row.update((name, len(row)) for name in more)
        ids = network.tokenizer.name_ids(more)
        names = torch.cat([names, network.encode_names(ids.to(device))])
    wanted = torch.full(targets.valid.shape, -1)  # [B, N], rows of the listed objects' names
    for b, (labels, instruction) in enumerate(zip(batch.labels, batch.instructions, strict=True)):
        for i, label in enumerate(labels):
            wanted[b, i] = row[instruction.classes[label]]
    known_rows = [[row[name] for name in names_[:MAX_UNLISTED]] for names_ in batch.unlisted_names]
    unlisted = torch.full((len(known_rows), tokens.features.shape[1] - of_token.shape[1] - listed), -1)
    for b, rows in enumerate(known_rows):
        rows = rows[: unlisted.shape[1]]
        unlisted[b, : len(rows)] = torch.tensor(rows, dtype=torch.int64)
    wanted, unlisted = wanted.to(device), unlisted.to(device)
    if wanted.shape[1] == 0:
        wanted = wanted.new_full((len(wanted), 1), -1)
    of_image_token = row_of(wanted, of_token)
    if unlisted.shape[1] > 0:
        of_image_token = torch.where(astray >= 0, row_of(unlisted, astray), of_image_token)
    of_query = torch.cat([of_image_token, wanted[:, :listed], unlisted], 1)
    total = names.new_zeros(())
    scale = names.shape[-1] ** -0.5
    asked = {"decoder": (tokens.features, of_query)}
    if at_positions is not None:
        asked = {"encoder": (tokens.memory, row_of(wanted, at_positions)), **asked}
    for part, (features, rows_) in asked.items():
        known = rows_ >= 0
        if known.any():
            logits = network.alignment[part](features[known]) @ names.to(features.dtype).T
            total = total + ALIGNMENT_WEIGHT * F.cross_entropy(logits.float() * scale, rows_[known])
    return total, of_query, list(row)


def naming_loss(network: Network, tokens: ImageTokens, of_query: Tensor, names: list[str]) -> Tensor:
    """Cross-entropy of what the LLM gets in an object's place, read as its words are, over the name's pieces.

    Attention then has but to copy what captions and answers name.

    Args:
        of_query: [B, M + D], positions in the names or −1.
    """
    known = of_query >= 0
    if not known.any():
        return torch.zeros((), device=of_query.device)
    boxes, objectness = tokens.boxes[-1].detach(), tokens.objectness[-1]
    given = network.slot_queries.image_tokens(tokens.features, boxes, objectness)[known]  # [n, C]
    pieces = network.embedding.weight[: network.tokenizer.vocab_size]
    chances = F.log_softmax(network.text_head(F.rms_norm(given, given.shape[-1:]), pieces), -1)  # [n, V]
    used, place = of_query[known].unique(return_inverse=True)
    spelled = network.tokenizer.word_ids([names[k] for k in used.tolist()]).to(place.device)[place]  # [n, T]
    is_piece = spelled != PADDING
    found = chances.gather(1, spelled.clamp(min=0)) * is_piece
    return -NAMING_WEIGHT * (found.sum(1) / is_piece.sum(1).clamp(min=1)).mean()


def row_of(wanted: Tensor, assigned: Tensor) -> Tensor:
    """Rows of the assigned objects: wanted [B, N], assigned [B, Q] (−1: none) → [B, Q], −1 where none is."""
    return torch.where(assigned >= 0, gather_rows(wanted, assigned), -1)


def proposal_loss(tokens: ImageTokens, targets: Targets, size: int) -> tuple[Tensor, Tensor]:
    """Token loss on the encoder's positions, several per object; size: the pictures' side in pixels.

    Returns:
        the object of every position [B, S] or −1, and the loss.
    """
    assert tokens.proposal_boxes is not None and tokens.proposal_objectness is not None
    shapes = torch.tensor([[-(-size // stride)] * 2 for stride in STRIDES])
    centres = anchor_boxes(shapes)[:, :2].to(tokens.proposal_boxes.device)
    with torch.no_grad():
        assigned = match_proposals(
            tokens.proposal_boxes, tokens.proposal_objectness, centres, targets.boxes, targets.valid
        )
        weight = outside_ignored(tokens.proposal_boxes, targets) | (assigned >= 0)
    loss = token_loss(tokens.proposal_boxes, tokens.proposal_objectness, assigned, targets.boxes, weight)
    return assigned, loss / 2  # several positions per object share an object's weight
