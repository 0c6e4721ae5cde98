"""Names that a text mentions, looked up among the image tokens.

"How many dogs are there?" asks for what the detector knows: which image tokens show a dog. An LLM of a few
layers matches words with image tokens badly, so a mention of a known name is matched for it, by the likeness
that names objects; what it finds is told where the name stands. The LLM says which of them are meant ("red
dogs") and what to make of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionllm.english import plural
from visionllm.model.config import ModelConfig
from visionllm.model.word_tokens import MEASURES
from visionllm.tokenizer import PADDING, Tokenizer

ANYTHING = ("object", "thing")  # fit whatever is there
GATE_DIM = 32
GATE_OPEN = 3.0  # logit of "this one is meant" at the start
NOUN_FLOOR = 0.01  # chance of a noun below which image tokens differ no more
THRESHOLDS = (0.2, 0.35, 0.5, 0.65)  # from which an image token counts as one of them
STEEPNESS = 12.0  # of those thresholds
MOST = 8  # counts from there on are told by their sum alone
AMOUNTS = len(THRESHOLDS) * (MOST + 2) + 2
RELATIONS = 4 * MEASURES + 2 * len(THRESHOLDS) + 1  # numbers that compare two mentions
RELATION_HIDDEN = 64


@dataclass(frozen=True)
class Mention:
    """Where a text mentions names: row, column of the last piece, the phrase's number in `MentionFinder`.

    previous: the last mention before it in the same text, by its place in the list; −1: none. Names within
        this one's ("cat" of "cat face") are not before it.
    """

    row: int
    column: int
    phrase: int
    previous: int


class MentionFinder:
    """Finds known names in pieces of text.

    A phrase is a known name, or the last words of some that are none themselves ("circle" of "red circle" and
    "blue circle"), each also in the plural, or one of ANYTHING.

    Attributes:
        fits: bool [phrases, V], the names that a phrase may mean.
    """

    def __init__(self, names: Sequence[str], tokenizer: Tokenizer) -> None:
        meanings: dict[str, set[int]] = {name: {v} for v, name in enumerate(names)}
        for v, name in enumerate(names):
            words = name.split(" ")
            for start in range(1, len(words)):
                ending = " ".join(words[start:])
                if ending not in names:
                    meanings.setdefault(ending, set()).add(v)
        for word in ANYTHING:
            meanings[word] = set(range(len(names)))
        self.fits = torch.zeros(len(meanings), len(names), dtype=torch.bool)
        self._tokenizer = tokenizer
        self._goes_on: dict[int, bool] = {}  # pieces that `goes_on` was asked about
        # From the last piece of a phrase to its first; None: a phrase starts here, its number.
        self._backwards: dict[int | None, Any] = {}
        singular = {tokenizer.encode_name(phrase) for phrase in meanings}
        for number, (phrase, found) in enumerate(meanings.items()):
            self.fits[number, list(found)] = True
            for text in dict.fromkeys((phrase, plural(phrase))):
                pieces = tokenizer.encode_name(text)
                if text != phrase and pieces in singular:
                    continue
                place = self._backwards
                for piece in reversed(pieces):
                    place = place.setdefault(piece, {})
                place[None] = number

    def find(self, ids: Tensor) -> list[Mention]:
        """Of the longest phrase that ends, with its word, at each place of pieces [B, T], if one does."""
        found: list[Mention] = []
        for row, pieces in enumerate(ids.tolist()):
            text = len(found)  # the first mention of this text: PADDING ends one
            for end, piece in enumerate(pieces):
                if piece == PADDING:
                    text = len(found)
                place, number, column, start = self._backwards.get(piece), None, end, end
                while place is not None:
                    if None in place:
                        number, start = place[None], column
                    column -= 1
                    place = place.get(pieces[column]) if column >= 0 else None
                if number is not None and not (end + 1 < len(pieces) and self.goes_on(pieces[end + 1])):
                    before = (i for i in range(len(found) - 1, text - 1, -1) if found[i].column < start)
                    found.append(Mention(row, end, number, next(before, -1)))
        return found

    def goes_on(self, piece: int) -> bool:
        """Whether a piece goes on with the word before it, as "board" of "cup" + "board"."""
        found = self._goes_on.get(piece)
        if found is None:
            before = self._tokenizer.encode_name("a")
            text = self._tokenizer.decode([*before, piece])[len(self._tokenizer.decode(before)) :]
            found = self._goes_on[piece] = text[:1].isalnum()
        return found

    def nouns(self, ids: Tensor) -> list[int]:
        """What each of the expressions [B, T] is about, a phrase's number: the name that it mentions first,
        as in "the cat left of the dog"; -1 where it mentions none.
        """
        first = [-1] * len(ids)
        for one in self.find(ids):
            # Of names within names ("cat face") the last is the longest.
            if one.previous < 0:
                first[one.row] = one.phrase
        return first


def noun_factor(names: Tensor, fits: Tensor, nouns: Tensor, power: float) -> Tensor:
    """How well image tokens suit the nouns of expressions, beside the one that suits each best.

    That is 1 for this one: which of them is meant, and whether any is, remains the class slot's to say.

    Args:
        names: fp32 [B, M, V], of `visionllm.model.told.name_chances`.
        fits: bool [phrases, V], of `MentionFinder`; nouns: int64 [B, K], of its `nouns`.

    Returns:
        fp32 [B, M, K] in 0..1; 1 where there is no noun.
    """
    chance = names @ fits[nouns.clamp(min=0)].to(names).transpose(1, 2) + NOUN_FLOOR
    factor = (chance / chance.amax(1, keepdim=True)) ** power
    return torch.where((nouns >= 0)[:, None], factor, 1.0)


class NameLookup(nn.Module):
    """What is told where a name is mentioned: of the image tokens that it may mean, how many they are, and
    how they compare with what the mention before it found ("is the cat larger than the dog?").
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.llm_dim
        self.norm = nn.LayerNorm(dim)
        self.asked = nn.Linear(dim, GATE_DIM)
        self.shown = nn.Linear(dim, GATE_DIM, bias=False)
        self.found = nn.Linear(dim, dim, bias=False)
        self.amount = nn.Linear(AMOUNTS, dim, bias=False)
        compared = nn.Linear(RELATION_HIDDEN, dim, bias=False)
        self.relation = nn.Sequential(nn.Linear(RELATIONS, RELATION_HIDDEN), nn.GELU(), compared)
        for module in (self.asked, self.found, self.amount, compared):  # changes nothing at first
            nn.init.zeros_(module.weight)
        nn.init.zeros_(self.asked.bias)

    def forward(
        self, states: Tensor, told: Tensor, measures: Tensor, likeness: Tensor, previous: Tensor
    ) -> Tensor:
        """For n mentions.

        Args:
            states: [n, C], of the LLM where they stand: which of the name are meant.
            told: [n, M, C], of image tokens; measures: [n, M, MEASURES], their boxes as numbers.
            likeness: fp32 [n, M] in 0..1, that they show the name.
            previous: int64 [n], of `Mention`.

        Returns:
            [n, C], to be added to the states.
        """
        keys = self.shown(told)
        meant = (keys @ self.asked(self.norm(states))[..., None]).squeeze(-1).float() * GATE_DIM**-0.5
        weight = likeness * (meant + GATE_OPEN).sigmoid()
        sharp = weight.square()  # many tokens that are a little alike say nothing
        share = sharp / (sharp.sum(1, keepdim=True) + 1e-3)
        found = (share.to(told.dtype)[:, None] @ told).squeeze(1)
        counts = counts_of(weight)
        # No product of matrices: autocast would round what is compared.
        relation = relation_of((share[..., None] * measures.float()).sum(1), counts, previous)
        told_here = self.found(found) + self.amount(amounts_of(weight, counts).to(told.dtype))
        return told_here + self.relation(relation.to(told.dtype))


def counts_of(weight: Tensor) -> Tensor:
    """Image tokens of weights [n, M] in 0..1 above each of THRESHOLDS: [n, thresholds]."""
    threshold = torch.tensor(THRESHOLDS, device=weight.device)
    return ((weight[:, None] - threshold[:, None]) * STEEPNESS).sigmoid().sum(-1)


def relation_of(measures: Tensor, counts: Tensor, previous: Tensor) -> Tensor:
    """Measures [n, MEASURES] and counts [n, thresholds] beside those of the mention before: [n, RELATIONS].

    Of differences also the tanh: which of two things is larger is a matter of sign.
    """
    there = (previous >= 0)[:, None].to(measures.dtype)
    before = measures[previous.clamp(min=0)] * there
    step = (measures - before) * there
    more = (counts - counts[previous.clamp(min=0)]) * there
    return torch.cat([measures, before, step, (8 * step).tanh(), more / 2, (2 * more).tanh(), there], 1)


def amounts_of(weight: Tensor, counts: Tensor) -> Tensor:
    """How many image tokens of weights [n, M] in 0..1 there are, with their `counts_of`: [n, AMOUNTS]."""
    order = torch.arange(MOST + 1, device=weight.device)
    about = F.relu(1 - (counts[..., None] - order).abs())  # [n, thresholds, MOST + 1]
    plain = [counts / MOST, weight.sum(1, keepdim=True) / MOST]
    most = weight.max(1, keepdim=True).values if weight.shape[1] else weight.sum(1, keepdim=True)
    return torch.cat([about.flatten(1), *plain, most], 1)
