"""Learning rate over the run, and the clock that a time-limited run goes by.

factor(step, progress) = min(1, (step + 1) / warmup) * (floor + (1 - floor) * (1 + cos(pi * progress)) / 2)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any


def learning_rate_factor(step: int, progress: float, warmup: int, floor: float) -> float:
    """Share of the base learning rate: linear warm-up over ``warmup`` steps, cosine over the progress 0..1.

    The cosine ends at ``floor`` and stays there.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    share = min(max(progress, 0.0), 1.0)
    return rise * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * share)))


class ActiveClock:
    """Seconds that a run was really at work: a suspended process must not lose its schedule.

    Each lap counts at most ``cap`` times the median of the recent laps of its kind, so a suspension (SIGSTOP,
    a sleeping laptop) adds next to nothing. The first ``settle`` laps of a kind count in full. The cap is
    generous because steps differ: a prompt with 300 names takes several times as long as one with 20.
    """

    def __init__(self, cap: float = 6.0, settle: int = 5, window: int = 101) -> None:
        self.seconds = 0.0
        self.cap = cap
        self.settle = settle
        self.window = window
        self._laps: dict[str, deque[float]] = {}

    def add(self, kind: str, seconds: float) -> None:
        """Count one lap of this kind ("step", "validation", ...)."""
        laps = self._laps.setdefault(kind, deque(maxlen=self.window))
        counted = min(seconds, self.cap * median(laps)) if len(laps) >= self.settle else seconds
        laps.append(seconds)
        self.seconds += counted

    def state(self) -> dict[str, Any]:
        """JSON-compatible state."""
        return {"seconds": self.seconds, "laps": {kind: list(laps) for kind, laps in self._laps.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self.seconds = float(state["seconds"])
        self._laps = {kind: deque(laps, maxlen=self.window) for kind, laps in state["laps"].items()}
