"""BLEU and CIDEr of captions, equal to COCO's published caption evaluation.

BLEU-n (Papineni et al., 2002): clipped n-gram precisions of the whole set, their geometric mean for lengths
1..n, times exp(1 - r/c) where the candidates' words c are fewer than those r of the references closest in
length.

CIDEr (Vedantam et al., arXiv 1411.5726), in the form CIDEr-D that COCO's evaluation reports under that name:

    g_n(s)       counts of n-grams in s, times log(pictures / pictures whose references have the n-gram)
    CIDEr_n      mean over references of exp(-(l_c - l_r)^2 / 2 sigma^2) * min(g_c, g_r) . g_r / |g_c| |g_r|
    CIDEr        10 * mean of CIDEr_1..CIDEr_4 and of the pictures, sigma = 6

so that a set of one picture has CIDEr 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from visionllm.evaluate.caption_words import caption_words

LONGEST = 4  # words of an n-gram
LENGTH_SIGMA = 6.0  # of CIDEr's length penalty, in words

NGrams = Counter[tuple[str, ...]]


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-1 to BLEU-4 and CIDEr of a set of captions.

    Args:
        candidates: one caption a picture.
        references: each picture's right ones, at least one.

    Returns:
        ``BLEU-1`` ... ``BLEU-4`` in 0..1 and ``CIDEr`` in 0..10; -1 each for an empty set.

    Raises:
        ValueError: another number of candidates than pictures, or a picture without a reference.
    """
    if len(candidates) != len(references):
        raise ValueError(
            f"captions: expected a candidate for each of {len(references)} pictures, got {len(candidates)}"
        )
    for position, given in enumerate(references):
        if isinstance(given, str) or not given:
            raise ValueError(f"captions: expected a list of references of picture {position}, got {given!r}")
    if not candidates:
        return {**{f"BLEU-{n}": -1.0 for n in range(1, LONGEST + 1)}, "CIDEr": -1.0}
    said = [caption_words(text) for text in candidates]
    right = [[caption_words(text) for text in given] for given in references]
    scores = {f"BLEU-{n}": value for n, value in enumerate(bleu(said, right), start=1)}
    return {**scores, "CIDEr": float(np.mean(cider(said, right)))}


def bleu(candidates: Sequence[list[str]], references: Sequence[list[list[str]]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the set; candidates and references are lists of words."""
    matched, possible = np.zeros(LONGEST), np.zeros(LONGEST)
    length = closest = 0
    for candidate, given in zip(candidates, references, strict=True):
        most: NGrams = Counter()
        for reference in given:
            most |= _ngrams(reference)
        for gram, count in (_ngrams(candidate) & most).items():
            matched[len(gram) - 1] += count
        possible += [max(0, len(candidate) - n) for n in range(LONGEST)]
        length += len(candidate)
        closest += min((abs(len(reference) - len(candidate)), len(reference)) for reference in given)[1]
    # The published evaluation's guards against 0/0; kept so that numbers are equal.
    precisions = (matched + 1e-15) / (possible + 1e-9)
    shortness = (length + 1e-15) / (closest + 1e-9)
    penalty = math.exp(1 - 1 / shortness) if shortness < 1 else 1.0
    return [float(penalty * math.prod(precisions[:n]) ** (1 / n)) for n in range(1, LONGEST + 1)]


def cider(candidates: Sequence[list[str]], references: Sequence[list[list[str]]]) -> np.ndarray:
    """CIDEr-D of every picture, float64 ``[pictures]``; candidates and references are lists of words."""
    grams = [[_ngrams(reference) for reference in given] for given in references]
    pictures_with: Counter[tuple[str, ...]] = Counter()
    for given in grams:
        pictures_with.update({gram for reference in given for gram in reference})
    pictures = math.log(max(1, len(references)))

    def weighted(counts: NGrams) -> tuple[list[dict[tuple[str, ...], float]], list[float]]:
        """The tf-idf vectors of each length, and their norms."""
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, count in counts.items():
            vectors[len(gram) - 1][gram] = count * (pictures - math.log(max(1, pictures_with[gram])))
        return vectors, [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]

    scores = []
    for words, given, lengths in zip(candidates, grams, references, strict=True):
        vectors, norms = weighted(_ngrams(words))
        total = 0.0
        for reference, reference_words in zip(given, lengths, strict=True):
            others, other_norms = weighted(reference)
            # Lengths are counted in pairs of words, as the published evaluation does.
            delta = max(0, len(words) - 1) - max(0, len(reference_words) - 1)
            penalty = math.exp(-(delta**2) / (2 * LENGTH_SIGMA**2))
            for vector, other, norm, other_norm in zip(vectors, others, norms, other_norms, strict=True):
                common = sum(
                    min(value, other.get(gram, 0.0)) * other.get(gram, 0.0) for gram, value in vector.items()
                )
                if norm and other_norm:
                    total += penalty * common / (norm * other_norm)
        scores.append(10 * total / (LONGEST * len(given)))
    return np.array(scores)


def _ngrams(words: Sequence[str]) -> NGrams:
    """Counts of the runs of 1 to LONGEST words."""
    return Counter(
        tuple(words[start : start + n]) for n in range(1, LONGEST + 1) for start in range(len(words) - n + 1)
    )
