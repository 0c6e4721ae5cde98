"""How captions and answers are written: greedily by default, sampled, or by beam search.

Needs no torch: the command line checks the options before it loads a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TextOptions:
    """Options of the causal decoding of one text.

    Raises:
        ValueError: a field is out of its bounds; the message names field, expected and got.
    """

    max_tokens: int = 128  # the text ends here at the latest
    temperature: float = 0.0  # 0: the most likely token each time; else logits are divided by it and sampled
    top_p: float = 1.0  # sampling keeps the most likely tokens that together have this probability
    beams: int = 1  # hypotheses kept by beam search; 1: none
    seed: int = 0  # of the sampling

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("beams", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"text options: {name} must be a whole number >= {least}, got {value!r}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"text options: temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"text options: top_p must be above 0 and at most 1, got {self.top_p}")
        if self.beams > 1 and self.temperature > 0:
            raise ValueError(
                f"text options: beams and temperature exclude each other, got {self.beams} beams at "
                f"temperature {self.temperature}"
            )
