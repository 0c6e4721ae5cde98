"""Which classes each picture's prompt lists, and in which order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

LISTED_SHARE = 0.75  # of a picture's classes, in prompts of a part of the classes: some must stay unlisted


@dataclass(frozen=True)
class ClassListing:
    """The names that a picture's prompt lists, as positions in the data set's categories, in token order."""

    indices: tuple[int, ...]

    def shuffled(self, seed: int) -> ClassListing:
        """The same names in another order, the same one for the same seed and number of names."""
        order = list(self.indices)
        random.Random(f"class order {seed}").shuffle(order)
        return ClassListing(tuple(order))


def list_all(count: int) -> ClassListing:
    """All ``count`` categories, in file order."""
    return ClassListing(tuple(range(count)))


def list_some(
    count: int,
    present: Sequence[int],
    listed: int,
    seed: int,
    image_id: int | str,
    unsure: Sequence[int] = (),
) -> ClassListing:
    """``listed`` of ``count`` categories in random order, present and absent ones mixed.

    Each class in the picture is listed with probability LISTED_SHARE, at least one of them; the rest of the
    list is absent ones. ``unsure`` ones, which may be in the picture without a box, are not taken for absent.
    The choice depends on the seed and the picture's id alone.
    """
    rng = random.Random(f"listed classes {seed} {image_id}")
    here = sorted(set(present))
    rng.shuffle(here)
    chosen = [index for position, index in enumerate(here) if position == 0 or rng.random() < LISTED_SHARE]
    chosen = chosen[: min(listed, count)]
    absent = absent_classes(count, here, unsure)
    chosen += rng.sample(absent, min(max(listed - len(chosen), 0), len(absent)))
    rng.shuffle(chosen)
    return ClassListing(tuple(chosen))


def list_absent(
    count: int,
    present: Sequence[int],
    listed: int,
    seed: int,
    image_id: int | str,
    unsure: Sequence[int] = (),
) -> ClassListing | None:
    """``listed`` categories that the picture does not show, in random order; None where there are none."""
    absent = absent_classes(count, present, unsure)
    if not absent:
        return None
    rng = random.Random(f"absent classes {seed} {image_id}")
    return ClassListing(tuple(rng.sample(absent, min(listed, len(absent)))))


def absent_classes(count: int, present: Sequence[int], unsure: Sequence[int]) -> list[int]:
    """Positions of the categories that are certainly not in the picture."""
    possible = {*present, *unsure}
    return [index for index in range(count) if index not in possible]
