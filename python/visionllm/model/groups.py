"""More names than a prompt lists: groups of names, with everything that does not depend on the group once.

    the names ─► text encoder ─► features                                                     `read_names`
    pictures ─► backbone, fusion with all the names, encoder, decoder ─► image tokens         once
    "The image is: <image>. Detect every object of {" ─► keys and values of the LLM           once
    the group's names and what follows, then the slots of the image tokens                    for every group

Asked group by group, each prompt would meet image tokens of its own, since the fusion reads the prompt's
names; here it reads those of all groups, as it would if one prompt listed them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from visionllm.model.known_names import probability_of_listed, rivals
from visionllm.model.photo_classifier import renamed
from visionllm.tokenizer import IMAGE, PADDING, Prompts

if TYPE_CHECKING:
    from visionllm.instruction import Instruction
    from visionllm.model.image_tokenizer import ImageTokens
    from visionllm.model.network import Network


@dataclass
class GroupAnswers:
    """What one group's slots say, K names of B pictures with M image tokens.

    Attributes:
        probabilities: fp32 [B, M, K + 1], of the group's names and, last, "no object".
        boxes: fp32 [B, M, 4], x1 y1 x2 y2 in shares of the picture.
        centers: fp32 [B, M, 2], l_i.
        objectness: fp32 [B, M], the same for all groups.
        known: fp32 [B, M, K], by `probability_of_listed`, with the names of all groups listed; None where
            known names play no part.
    """

    probabilities: Tensor
    boxes: Tensor
    centers: Tensor
    objectness: Tensor
    known: Tensor | None


@dataclass
class NameGroups:
    """Groups of names as the network reads them: of `read_names`, for any number of pictures.

    Attributes:
        groups: the instructions.
        prompts: theirs, one row a group.
        distinct: [U, C], the features of all names in order; description: [D, C], those of the wording.
        shared: how many tokens all prompts begin with alike.
    """

    groups: Sequence[Instruction]
    prompts: Prompts
    distinct: Tensor
    description: Tensor
    shared: int


@torch.inference_mode()
def read_names(network: Network, groups: Sequence[Instruction]) -> NameGroups:
    """What the pictures play no part in, of detection instructions that differ in their names alone.

    Args:
        network: in inference mode.
        groups: instructions for the task detection in one wording, in which the picture stands before the
            class set, as in the default one: what stands there is read once a picture.

    Raises:
        ValueError: no groups, another task, a name in two groups, or the picture behind the class set.
    """
    _check_groups(groups)
    prompts = network.tokenizer.prompts(groups, network.config.num_queries).to(network.device)
    shared = _shared_columns(prompts)
    if (prompts.ids[:, shared:] == IMAGE).any():
        raise ValueError("find_groups: <image> must stand before the class set in every group's wording")
    distinct = network.encode_names(prompts.names)
    return NameGroups(groups, prompts, distinct, network.text_encoder(prompts.description[:1])[0], shared)


@torch.inference_mode()
def find_groups(
    network: Network,
    images: Tensor,
    groups: Sequence[Instruction] | NameGroups,
    sizes: Tensor | None = None,
    originals: Sequence[np.ndarray] | None = None,
) -> Iterator[GroupAnswers]:
    """The answers to detection instructions that differ in their names alone, one after the other.

    Args:
        network: in inference mode.
        images, sizes, originals: as for `Network.find`.
        groups: as for `read_names`, or what it returned.

    Raises:
        ValueError: as `read_names`, or pictures of another form.
    """
    from visionllm.model.llm import KVCache
    from visionllm.model.network import Text, pool_names
    from visionllm.model.slots import SlotFormat, SlotReading, extent_of, points_of

    network.check_images("find_groups", images, sizes, originals)
    read_groups = groups if isinstance(groups, NameGroups) else read_names(network, groups)
    groups, prompts, distinct = read_groups.groups, read_groups.prompts, read_groups.distinct
    description, shared = read_groups.description, read_groups.shared
    batch, queries = len(images), network.config.num_queries
    read = torch.cat([description, distinct])[None].expand(batch, -1, -1)
    mask = torch.cat([prompts.description[0] >= 0, torch.ones_like(distinct[:, 0], dtype=torch.bool)])
    text = Text(read, mask[None].expand(batch, -1), distinct[None].expand(batch, -1, -1), distinct)
    tokens = network.image_tokens(images.to(network.device), text, sizes=sizes)
    network.call_photos(tokens, [[name for g in groups for name in g.classes]] * batch, originals)
    boxes = tokens.boxes[-1][:, :queries]
    features = tokens.features[:, :queries]
    known = _known(network, features, distinct, groups)
    slots = network.slot_queries(features, boxes, SlotFormat())

    rows = [_columns(prompts, g, shared, batch) for g in range(len(groups))]
    prefix = _embedded_prefix(network, prompts, tokens, shared, batch)
    longest = shared + max(ids.shape[1] for ids, _ in rows)
    cache = KVCache(batch, longest, network.device)
    network.llm.read(prefix, torch.ones(prefix.shape[:2], dtype=torch.bool, device=network.device), cache)
    lengths = cache.lengths
    for g, (ids, name_index) in enumerate(rows):
        # What the last group wrote behind the shared columns is written over.
        cache.used, cache.lengths = shared, lengths
        cache.mask[:, shared:] = False
        tail = _embed_words(network, ids)
        states = network.llm.read(tail, torch.ones_like(ids, dtype=torch.bool), cache)
        count = len(groups[g].classes)
        names = distinct[prompts.name_row[g, :count]].expand(batch, -1, -1)
        class_rows = network.slot_head.rows(
            pool_names(states, name_index, count), names, network.class_tokens.weight
        )
        reading = SlotReading(
            network.slot_head,
            network.llm.answer(slots.to(tail.dtype), cache),
            class_rows,
            torch.ones(batch, count, dtype=torch.bool, device=network.device),
            boxes,
        )
        answers = reading.answers(network.config.coordinate_window)
        listed = [groups[g].classes] * batch
        own = renamed(network.config, tokens, listed, answers.probabilities[..., :-1])
        yield GroupAnswers(
            probabilities=torch.cat([own, answers.probabilities[..., -1:]], -1),
            boxes=extent_of(points_of(answers.offsets, boxes)).clamp(0, 1),
            centers=boxes[..., :2],
            objectness=tokens.objectness[-1][:, :queries].sigmoid(),
            known=None if known is None else known[..., prompts.name_row[g, :count]],
        )


def _check_groups(groups: Sequence[Instruction]) -> None:
    if not groups:
        raise ValueError("find_groups: expected at least one group, got none")
    seen: set[str] = set()
    for group in groups:
        if group.task != "detection":
            raise ValueError(f"find_groups: the task must be detection, got {group.task}")
        for name in group.classes:
            if name in seen:
                raise ValueError(f"find_groups: {name!r} is in two groups")
        seen.update(group.classes)


def _known(
    network: Network, features: Tensor, distinct: Tensor, groups: Sequence[Instruction]
) -> Tensor | None:
    """[B, M, U], how likely each name is among all of them and the known ones beside them."""
    if network.config.known_power <= 0 or not network.known_names:
        return None
    batch = len(features)
    every = [name for group in groups for name in group.classes]  # in the order of `distinct`
    others = rivals(network.known_names, [every]).to(network.device).expand(batch, -1)
    listed = torch.ones(batch, len(distinct), dtype=torch.bool, device=network.device)
    return probability_of_listed(
        network.alignment["decoder"](features),
        distinct[None].expand(batch, -1, -1),
        listed,
        network.known_features(),
        others,
    )


def _shared_columns(prompts: Prompts) -> int:
    """How many tokens all the groups' prompts begin with alike; names do not count, however they begin."""
    same = (prompts.ids == prompts.ids[:1]).all(0) & (prompts.name_index < 0).all(0)
    return int(same.long().cumprod(0).sum())


def _columns(prompts: Prompts, group: int, shared: int, batch: int) -> tuple[Tensor, Tensor]:
    """A group's ids and name index behind the shared columns, without padding, [B, T] each."""
    length = int((prompts.ids[group] != PADDING).sum())
    ids, name_index = (
        row[group, shared:length].expand(batch, -1) for row in (prompts.ids, prompts.name_index)
    )
    return ids, name_index


def _embedded_prefix(
    network: Network, prompts: Prompts, tokens: ImageTokens, shared: int, batch: int
) -> Tensor:
    """The shared columns [B, P, C_llm], with the pictures' image tokens in their places."""
    first = prompts.of(torch.zeros(batch, dtype=torch.int64, device=prompts.ids.device))
    return network.embed(first, tokens)[:, :shared]


def _embed_words(network: Network, ids: Tensor) -> Tensor:
    """Words and class tokens [B, T] → [B, T, C_llm]."""
    is_class = ids >= network.tokenizer.vocab_size
    words = network.embedding(ids.masked_fill(is_class, 0).clamp(min=0))
    return torch.where(
        is_class[..., None], network.class_tokens((ids - network.tokenizer.vocab_size).clamp(min=0)), words
    )
