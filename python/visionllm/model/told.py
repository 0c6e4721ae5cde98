"""What the LLM's layers for words are told beside the prefix: of image tokens, and at names in the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from visionllm.model.mentions import NameLookup
from visionllm.model.photo_classifier import renamed
from visionllm.model.word_tokens import measures_of
from visionllm.tokenizer import IMAGE, PADDING, Prompts

if TYPE_CHECKING:
    from visionllm.model.image_tokenizer import ImageTokens
    from visionllm.model.network import Network


@dataclass
class Told:
    """For a batch of prompts and what is read behind them.

    Attributes:
        places: [B, P, C_llm], of image tokens where they stand, 0 elsewhere.
        tokens: [B, M, C_llm], the same alone.
        lookup: what makes of a mention what is told there; None: no names are known.
        measures: [B, M, MEASURES], of image tokens' boxes.
        rows, columns: int64 [n], where names are mentioned; previous: int64 [n], of `Mention`.
        likeness: fp32 [n, M] in 0..1, that an image token shows the name.
    """

    places: Tensor
    tokens: Tensor
    lookup: NameLookup | None = None
    measures: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    previous: Tensor | None = None
    likeness: Tensor | None = None

    def show(self, x: Tensor) -> Tensor:
        """Before the layers for words: x [B, at least P, C_llm]."""
        return x + F.pad(self.places, (0, 0, 0, x.shape[1] - self.places.shape[1]))

    def look_up(self, x: Tensor) -> Tensor:
        """After the first of them, which brings to a name what is said of it before."""
        if self.lookup is None or self.rows is None or self.measures is None or not len(self.rows):
            return x
        where, rows = (self.rows, self.columns), self.rows
        told = self.lookup(x[where], self.tokens[rows], self.measures[rows], self.likeness, self.previous)
        return x.index_put(where, told.to(x.dtype), accumulate=True)


def told_of(
    network: Network, prompts: Prompts, tokens: ImageTokens, colours: Tensor, asked: Tensor | None = None
) -> Told | None:
    """What there is to tell; None where there are no layers for words.

    Args:
        colours: of `visionllm.model.word_tokens.colours_at`.
        asked: int64 [B, T], pieces read behind the prompts in which names are mentioned too.
    """
    if not network.config.word_layers:
        return None
    m = network.config.num_queries
    features = tokens.features[:, :m].detach()
    objectness = tokens.objectness[-1][:, :m].detach()
    names = name_chances(network, tokens) if network.known_names else None
    boxes = tokens.boxes[-1][:, :m].detach()
    measures = measures_of(boxes, objectness)
    told = network.word_tokens(
        features,
        boxes,
        measures,
        colours,
        None if names is None else names @ known_words(network),
    )
    is_image = (prompts.ids == IMAGE)[..., None]
    places = told.new_zeros(*is_image.shape[:2], told.shape[-1]).masked_scatter(is_image, told)
    if names is None:
        return Told(places, told)
    finder = network.mention_finder()
    found = [(one.row, one.column, one.phrase, one.previous) for one in finder.find(prompts.ids)]
    if asked is not None:
        lengths, first = (prompts.ids != PADDING).sum(1).tolist(), len(found)
        for one in finder.find(asked):
            previous = -1 if one.previous < 0 else first + one.previous
            found.append((one.row, lengths[one.row] + one.column, one.phrase, previous))
    rows, columns, phrases, before = torch.tensor(found, device=features.device).view(-1, 4).long().T
    fits = finder.fits.to(names)[phrases.to(finder.fits.device)]  # [n, V]
    chance = (names[rows] @ fits[..., None]).squeeze(-1)
    likeness = chance * objectness[rows].float().sigmoid()
    return Told(places, told, network.name_lookup, measures, rows, columns, before, likeness)


def name_chances(network: Network, tokens: ImageTokens) -> Tensor:
    """Of each known name, that an image token shows it: fp32 [B, M, V], of sum 1.

    An object's name can be told from its feature (`alignment`) long before a small LLM has learned to; on
    photos the photo classifier has a say.
    """
    features = tokens.features[:, : network.config.num_queries].detach()
    names = network.known_features()
    likeness = network.alignment["decoder"](features) @ names.to(features.dtype).T
    own = (likeness.float() * names.shape[-1] ** -0.5).softmax(-1)
    return renamed(network.config, tokens, [network.known_names] * len(own), own)


def known_words(network: Network) -> Tensor:
    """The sum of each known name's words over the root of their number: fp32 [V, C_llm]."""
    ids = network.known_ids()  # [V, T]
    is_piece = ids != PADDING
    words = network.word_embeddings(ids) * is_piece[..., None]
    return words.sum(1) / is_piece.sum(1, keepdim=True).sqrt()
