"""How likely an object bears a listed name rather than any other name that the network knows.

A class slot chooses among the listed names and "no object". That an object is none of twenty names is hard to
tell from those twenty alone; that it is rather one of the hundreds of names training knew is easy. So each
image token's feature is read against the text features of the listed names and of all known ones: a softmax
over both, whose value at the listed names goes into the score (`ModelConfig.known_power`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

FILE = "known_names.txt"  # in a weights folder: one name a line; may be absent


def read_names(file: Path) -> tuple[str, ...]:
    """The names of a file; none if there is no such file.

    Raises:
        ValueError: not UTF-8, an empty line, or a name that stands there twice.
    """
    if not file.is_file():
        return ()
    try:
        names = tuple(file.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text: {error}") from error
    seen = set()
    for number, name in enumerate(names, 1):
        if not name.strip() or name in seen:
            raise ValueError(f"{file}, line {number}: expected a name that is new, got {name!r}")
        seen.add(name)
    return names


def text_of(names: Sequence[str]) -> str:
    """What `read_names` reads: one name a line."""
    return "".join(f"{name}\n" for name in names)


def rivals(known: Sequence[str], listed: Sequence[Sequence[str]]) -> Tensor:
    """bool [B, V], True where picture b's prompt does not list known name v, whatever its case."""
    mask = torch.ones(len(listed), len(known), dtype=torch.bool)
    rows: dict[str, list[int]] = {}
    for v, name in enumerate(known):
        rows.setdefault(name.casefold(), []).append(v)
    for b, names in enumerate(listed):
        for name in names:
            mask[b, rows.get(name.casefold(), [])] = False
    return mask


def probability_of_listed(
    features: Tensor, listed: Tensor, listed_mask: Tensor, known: Tensor, rival_mask: Tensor
) -> Tensor:
    """Softmax over listed and rival names, at the listed ones.

    Args:
        features: [B, M, C], image tokens in the text features' space.
        listed: [B, K, C] text features; listed_mask: bool [B, K].
        known: [V, C] text features; rival_mask: bool [B, V], where known name v counts for picture b.

    Returns:
        fp32 [B, M, K]; 0 where listed_mask is False.
    """
    scale = features.shape[-1] ** -0.5
    own = (features @ listed.to(features.dtype).transpose(1, 2)).float() * scale
    others = (features @ known.to(features.dtype).T).float() * scale
    own = own.masked_fill(~listed_mask[:, None], float("-inf"))
    others = others.masked_fill(~rival_mask[:, None], float("-inf"))
    total = torch.cat([own, others], -1).logsumexp(-1, keepdim=True)
    return (own - total).exp().nan_to_num(0.0)  # NaN: neither a listed name nor a rival
