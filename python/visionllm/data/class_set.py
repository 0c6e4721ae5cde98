"""Which names a training prompt lists: some of what the picture shows, the rest absent, in random order.

After VisionLLM (Wang et al. 2023, arXiv:2305.11175, section 3.2): class sets and their order are drawn anew
for every sample, so that ``<ck>`` means nothing but "the k-th listed name". Only a name that its source
annotates exhaustively may be listed as absent (but see `PromptSettings.foreign_names`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class PromptSettings:
    """How training prompts are drawn. Shares are of samples unless a comment says otherwise."""

    usual_count: tuple[float, float, float] = (
        4,
        20,
        30,
    )  # number of names: lowest, most frequent, highest; log scale
    middle_share: float = 0.10  # of batches: number of names log-uniform in middle_count
    middle_count: tuple[int, int] = (60, 120)
    large_share: float = 0.05  # of batches: from middle_count's end to all names, half of them all names
    list_present: float = 0.8  # each present name is listed with this probability
    only_absent: float = 0.06  # prompts that list nothing of what is there
    hard_negatives: float = (
        0.3  # prompts whose absent names prefer those that share a word with a present one
    )
    hard_share: float = 0.5  # of the absent names of such a prompt, at most
    # Of the photos' prompts: those that may list the other sources' names too, taken to be absent. Without
    # them, names that only drawings bear tell the model to expect a drawing and pass over a photo's objects.
    foreign_names: float = 0.0
    # False: every prompt lists all names of its source in their own order, whatever is said above.
    random_classes: bool = True
    usual_range: int = 512
    other_range: float = 0.4  # prompts with another range
    ranges: tuple[int, int] = (100, 2000)  # log-uniform
    max_objects: int = 40  # listed objects beyond this become areas to ignore, the smallest first


def draw_count(rng: np.random.Generator, most: int, settings: PromptSettings) -> tuple[int, str]:
    """How many names a batch's prompts list, at most ``most``; and "usual", "middle" or "large"."""
    kind = rng.random()
    if kind < settings.large_share:
        lowest = min(settings.middle_count[1], most)
        everything = rng.random() < 0.5
        count = most if everything else math.exp(rng.uniform(math.log(lowest), math.log(most)))
        return max(1, min(round(count), most)), "large"
    if kind < settings.large_share + settings.middle_share:
        count = math.exp(rng.uniform(*np.log(settings.middle_count)))
        return max(1, min(round(count), most)), "middle"
    low, mode, high = np.log(settings.usual_count)
    return max(1, min(round(math.exp(rng.triangular(low, mode, high))), most)), "usual"


def draw_range(rng: np.random.Generator, settings: PromptSettings) -> int:
    """The coordinate range that a prompt asks for."""
    if rng.random() >= settings.other_range:
        return settings.usual_range
    return round(math.exp(rng.uniform(*np.log(settings.ranges))))


def draw_class_set(
    present: Sequence[str],
    unclear: Sequence[str],
    vocabulary: tuple[str, ...],
    count: int,
    rng: np.random.Generator,
    settings: PromptSettings,
) -> tuple[str, ...]:
    """``count`` different names in random order.

    Args:
        present: names with at least one target box in the picture.
        unclear: names of crowds and cut-off objects: neither present nor absent, listed only for want of
            others.
        vocabulary: names whose absence is known where no box is.
        count: how many names to list.
        rng: where all randomness comes from.
        settings: how.

    Raises:
        ValueError: there are fewer than ``count`` names in all.
    """
    present_names = list(dict.fromkeys(present))
    shown = set(present_names).union(unclear)
    absent = [name for name in vocabulary if name not in shown]

    listed: list[str] = []
    if rng.random() >= settings.only_absent or len(absent) < count:
        listed = [name for name in present_names if rng.random() < settings.list_present]
        if not listed and present_names:
            listed = [present_names[rng.integers(len(present_names))]]
        if len(listed) > count:
            # All of a short prompt's names present, or only half of them: both happen.
            listed = _pick(listed, int(rng.integers((count + 1) // 2, count + 1)), rng)

    wanted = count - len(listed)
    from_absent = min(wanted, len(absent))
    hard: list[str] = []
    if present_names and rng.random() < settings.hard_negatives:
        words = frozenset().union(*map(_words, present_names))
        similar = [name for name in absent if not words.isdisjoint(_words(name))]
        hard = _pick(similar, min(math.ceil(from_absent * settings.hard_share), from_absent), rng)
        chosen = set(hard)
        absent = [name for name in absent if name not in chosen]
    names = listed + hard + _pick(absent, from_absent - len(hard), rng)

    if len(names) < count:
        taken = set(names)
        rest = [name for name in present_names if name not in taken]
        names += _pick(rest, count - len(names), rng)
    if len(names) < count:
        names += _pick(sorted(shown.difference(present_names)), count - len(names), rng)
    if len(names) < count:
        raise ValueError(f"count: expected at most {len(shown.union(vocabulary))} names, got {count}")
    return tuple(names[i] for i in rng.permutation(count))


def _pick(names: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """``count`` of the names (all if there are fewer) in random order."""
    if count <= 0:
        return []
    return [names[i] for i in rng.permutation(len(names))[:count]]


_FUNCTION_WORDS = frozenset(("and", "for", "from", "the", "with"))


@lru_cache(maxsize=1 << 14)
def _words(name: str) -> frozenset[str]:
    """The words of a name that say something: "slice of pizza" has "slice" and "pizza"."""
    words = name.lower().replace("-", " ").split()
    return frozenset(word for word in words if len(word) > 2 and word not in _FUNCTION_WORDS)
