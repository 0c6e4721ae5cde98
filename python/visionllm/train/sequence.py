"""Detection as one sequence, token by token (Pix2Seq, arXiv:2109.10852): VisionLLM, table 4d.

Behind the prompt stand, object by object, ``<ck> <x1> <y1> <x2> <y2>``, in random order, and at the end "no
object". Every token is predicted from those before it; in prediction the likeliest is written and read again.
Coordinates are location tokens relative to the picture's centre. Nothing is added to the network: a written
token is read as the row that predicts it, beside the format token of what comes next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from visionllm.instruction.instruction import Instruction
from visionllm.model.boxes import cxcywh_to_xyxy
from visionllm.model.llm import KVCache
from visionllm.model.network import Detections, pool_names
from visionllm.model.slots import expected_offsets, location_loss
from visionllm.tokenizer import PADDING, Prompts
from visionllm.train.losses import (
    CLASS_WEIGHT,
    LOCATION_WEIGHT,
    Targets,
    alignment_loss,
    drawings_of,
    gather_rows,
    outside_ignored,
    proposal_loss,
    router_loss,
    seen_in_training,
    token_loss,
)
from visionllm.train.matcher import match, pair_costs

if TYPE_CHECKING:
    from visionllm.data.train_batch import TrainBatch
    from visionllm.model.image_tokenizer import ImageTokens
    from visionllm.model.network import Network, Text

TOKENS = 5  # of an object
WRITTEN_OBJECTS = 30  # that prediction writes for each picture
CENTRE = 0.5  # of the picture, which coordinates are relative to


def sequence_loss(network: Network, batch: TrainBatch) -> dict[str, Tensor]:
    """L_tok as usual, without denoising, and next-token cross-entropy of the sequence.

    "total" is the sum of the terms; "metric/class_accuracy" is detached.
    """
    device = network.device
    targets = Targets.from_batch(batch, device)
    prompts = network.tokenizer.prompts(batch.instructions, network.config.num_queries).to(device)
    text = network.encode_text(prompts)
    tokens = seen_in_training(network, batch, text)
    losses = tokenizer_loss(network, batch, text, tokens, targets)
    if tokens.drawing is not None:
        losses["router"] = router_loss(tokens.drawing, drawings_of(batch, device))

    count = targets.boxes.shape[1]
    keys = torch.rand(targets.valid.shape, device=device).masked_fill(~targets.valid, 2.0)
    order = keys.argsort(1)  # the objects in random order, padding last
    labels, valid = targets.labels.gather(1, order), targets.valid.gather(1, order)
    corners = gather_rows(cxcywh_to_xyxy(targets.boxes), order)  # [B, N, 4]
    offsets = (corners - CENTRE) * bins_per_unit(network)
    written = object_tokens(network, labels, offsets.round().long())  # [B, N, 5, C]
    before = torch.cat(
        [written.new_zeros(len(written), 1, written.shape[-1]), written.flatten(1, 2)], 1
    )  # [B, 5N + 1, C]
    states, rows = read_sequence(network, prompts, text, tokens, before)

    length = valid.sum(1, keepdim=True)
    place = torch.arange(count + 1, device=device)
    no_object = prompts.class_mask.shape[1]
    wanted = torch.where(place < length, F.pad(labels, (0, 1)), no_object)  # [B, N + 1]
    logits = network.slot_head.class_logits(states[:, ::TOKENS], rows, prompts.class_mask)
    asked = place <= length
    losses["class"] = CLASS_WEIGHT * F.cross_entropy(logits[asked], wanted[asked])
    if valid.any():
        coordinates = states[:, :-1].unflatten(1, (-1, TOKENS))[:, :, 1:]  # [B, N, 4, C]
        found = network.slot_head.location_logits(coordinates[valid])
        where = offsets[valid].flatten()
        summed = location_loss(found.flatten(0, 1), where, torch.ones_like(where))
        losses["location"] = LOCATION_WEIGHT * summed / len(where)
    result = dict(losses)
    result["total"] = torch.stack(list(losses.values())).sum()
    with torch.no_grad():
        result["metric/class_accuracy"] = (logits.argmax(-1) == wanted)[asked].float().mean()
    return result


def tokenizer_loss(
    network: Network, batch: TrainBatch, text: Text, tokens: ImageTokens, targets: Targets
) -> dict[str, Tensor]:
    """L_tok and the alignment with names: what the image tokenizer learns whatever reads its tokens."""
    objects = targets.valid.sum().clamp(min=1)
    losses: dict[str, Tensor] = {}
    at_positions = None
    if tokens.proposal_boxes is not None:
        at_positions, proposals = proposal_loss(tokens, targets, batch.images.shape[1])
        losses["proposals"] = proposals / objects
    total = torch.zeros((), device=network.device)
    for boxes, objectness in zip(tokens.boxes, tokens.objectness, strict=True):
        with torch.no_grad():
            assigned = match(pair_costs(boxes, objectness, targets.boxes), targets.valid)
            weight = (outside_ignored(boxes, targets) | (assigned >= 0)).float()
        total = total + token_loss(boxes, objectness, assigned, targets.boxes, weight) / objects
    # No denoising queries stand at unlisted objects.
    batch = dataclasses.replace(batch, unlisted_names=[[] for _ in batch.unlisted_names])
    nothing = torch.full_like(assigned, -1)
    losses["tokens"] = total
    if network.config.text_guidance:
        losses["alignment"], _, _ = alignment_loss(
            network, batch, text, tokens, targets, at_positions, assigned, nothing, 0
        )
    return losses


def bins_per_unit(network: Network) -> int:
    """Location tokens to a picture's width or height."""
    return (network.slot_head.locations.shape[0] - 1) // 2


def object_tokens(network: Network, labels: Tensor, bins: Tensor) -> Tensor:
    """Objects as they are read back.

    Args:
        labels: int64 [B, N]; bins: int64 [B, N, 4], around 0.

    Returns:
        [B, N, 5, C_llm].
    """
    half = bins_per_unit(network)
    # The rows that predict a coordinate start small; √C is the factor of the Transformer's shared embeddings.
    locations = network.slot_head.locations * network.config.llm_dim**0.5
    coordinates = locations[(bins + half).clamp(0, 2 * half)]
    return torch.cat([network.class_tokens(labels)[:, :, None], coordinates], 2)


def read_sequence(
    network: Network, prompts: Prompts, text: Text, tokens: ImageTokens, before: Tensor
) -> tuple[Tensor, Tensor]:
    """One pass over the prompt and the whole sequence.

    Args:
        before: [B, S, C_llm], what stands before each token; zeros before the first.

    Returns:
        the states [B, S, C_llm] that predict the tokens, and the rows [B, K, C_llm] of the listed classes.
    """
    kind = torch.arange(before.shape[1], device=before.device) % TOKENS
    slots = before + network.slot_queries.format.weight[kind]
    prefix = network.embed(prompts, tokens)
    prefix_states, states = network.llm(prefix, prompts.ids != PADDING, slots[:, None].to(prefix.dtype))
    return states[:, 0], class_rows(network, prompts, text, prefix_states)


def class_rows(network: Network, prompts: Prompts, text: Text, prefix_states: Tensor) -> Tensor:
    """What class tokens are predicted with, [B, K, C_llm]."""
    names = pool_names(prefix_states, prompts.name_index, prompts.class_mask.shape[1])
    return network.slot_head.rows(names, text.names, network.class_tokens.weight)


@torch.inference_mode()
def find_in_sequence(
    network: Network,
    images: Tensor,
    instructions: Sequence[Instruction],
    top: int = 100,
    spread: bool = False,
) -> list[Detections]:
    """As `Network.find` for detection, token by token.

    WRITTEN_OBJECTS are always written, with the likeliest class even where "no object" is likelier: what
    comes behind the end has a low probability, which is its score.
    """
    if spread:
        raise ValueError("find_in_sequence: spread is of location tokens in parallel, got spread=True")
    prompts, text, tokens = network.see("find", images, instructions, ("detection",))
    steps = TOKENS * WRITTEN_OBJECTS
    cache = KVCache(len(images), prompts.ids.shape[1] + steps, network.device)
    prefix_states = network.llm.read(network.embed(prompts, tokens), prompts.ids != PADDING, cache)
    rows = class_rows(network, prompts, text, prefix_states)
    there = torch.ones(len(images), 1, dtype=torch.bool, device=network.device)
    half, window = bins_per_unit(network), network.config.coordinate_window

    def state(before: Tensor, kind: int) -> Tensor:
        """The state [B, C] that predicts the next token, from the last one's row [B, C]."""
        slot = before + network.slot_queries.format.weight[kind]
        return network.llm.read(slot[:, None], there, cache)[:, 0]

    before = prefix_states.new_zeros(len(images), network.config.llm_dim)
    scores, labels, corners, bins = [], [], [], []
    for _ in range(WRITTEN_OBJECTS):
        logits = network.slot_head.class_logits(state(before, 0)[:, None], rows, prompts.class_mask)
        score, label = logits[:, 0].softmax(-1)[:, :-1].max(-1)
        before = network.class_tokens(label)
        said, places = [], []
        for kind in range(1, TOKENS):
            found = network.slot_head.location_logits(state(before, kind))
            best = found.argmax(-1)
            said.append(best - half)
            places.append(expected_offsets(found, window, best) + CENTRE)
            before = network.slot_head.locations[best] * network.config.llm_dim**0.5
        scores.append(score)
        labels.append(label)
        bins.append(torch.stack(said, -1))
        corners.append(torch.stack(places, -1))
    box = torch.stack(corners, 1).clamp(0, 1)  # [B, N, 4]
    low, high = torch.minimum(box[..., :2], box[..., 2:]), torch.maximum(box[..., :2], box[..., 2:])
    box = torch.cat([low, high], -1)
    results = []
    for b in range(len(images)):
        score, order = torch.stack(scores, 1)[b].topk(min(top, WRITTEN_OBJECTS))
        centre = torch.full((len(order), 2), CENTRE, device=network.device)
        label, said_bins = torch.stack(labels, 1)[b, order], torch.stack(bins, 1)[b, order]
        points = box[b, order].unflatten(-1, (2, 2))
        results.append(Detections(box[b, order], score, label, centre, said_bins, points))
    return results
