"""How sure the network is that an image token is an object of a listed name.

    score = objectness^a · class probability^(1 − a) · (probability among all known names)^c

a is `ModelConfig.objectness_power`, c `known_power`; `visionllm.train.calibrate` chooses them. On photos
class probabilities are the slots' and the photo classifier's (`renamed`). No known name
need fit an expression: there, how well the token suits its noun takes the last factor's place (`noun_power`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visionllm.model.known_names import probability_of_listed, rivals
from visionllm.model.mentions import noun_factor
from visionllm.model.photo_classifier import renamed
from visionllm.model.told import name_chances
from visionllm.tokenizer import PADDING, Prompts, pad

if TYPE_CHECKING:
    from visionllm.instruction import Instruction
    from visionllm.model.image_tokenizer import ImageTokens
    from visionllm.model.network import Network, Text


def combined(objectness: Tensor, probability: Tensor, known: Tensor | None, a: float, c: float) -> Tensor:
    """The formula above, of broadcastable tensors; without known names their factor is 1."""
    scores = objectness**a * probability ** (1 - a)
    return scores if known is None else scores * known**c


def token_scores(
    network: Network,
    prompts: Prompts,
    text: Text,
    tokens: ImageTokens,
    instructions: Sequence[Instruction],
    probabilities: Tensor,
) -> Tensor:
    """Scores [B, M, K] of image tokens being objects of the listed classes.

    probabilities: [B, M, K + 1], of the classes and "no object".
    """
    config, queries = network.config, network.config.num_queries
    objectness = tokens.objectness[-1].sigmoid()[..., None]  # [B, M, 1]
    own = renamed(config, tokens, [one.classes for one in instructions], probabilities[..., :-1])
    named = [one.task != "grounding" for one in instructions]
    likely = None
    if config.known_power > 0 and config.text_guidance and network.known_names and any(named):
        features = network.alignment["decoder"](tokens.features[:, :queries])
        others = rivals(network.known_names, [one.classes for one in instructions]).to(network.device)
        known = network.known_features()
        likely = probability_of_listed(features, text.names, prompts.class_mask, known, others)
        likely = torch.where(torch.tensor(named, device=network.device)[:, None, None], likely, 1.0)
    scores = combined(objectness, own, likely, config.objectness_power, config.known_power)
    if config.noun_power > 0 and network.known_names and not all(named):
        names = name_chances(network, tokens)
        fits = network.mention_finder().fits.to(network.device)
        nouns = nouns_of(network, instructions, scores.shape[2])
        scores = scores * noun_factor(names, fits, nouns, config.noun_power)
    return scores


def nouns_of(network: Network, instructions: Sequence[Instruction], count: int) -> Tensor:
    """int64 [B, count], of `MentionFinder.nouns`, for the expressions of grounding; −1 for all else."""
    nouns = torch.full((len(instructions), count), -1)
    for row, one in zip(nouns, instructions, strict=True):
        if one.task == "grounding" and one.classes:
            pieces = pad([network.tokenizer.encode_name(text) for text in one.classes], PADDING)
            row[: len(pieces)] = torch.tensor(network.mention_finder().nouns(pieces))
    return nouns.to(network.device)
