"""What a network keeps between calls: of the names it knows, and of the last instructions.

Pictures are mostly asked the same, one after the other; and the text features of hundreds of known names cost
more than a picture does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from visionllm.model.mentions import MentionFinder
from visionllm.tokenizer import Tokenizer

KEPT_INSTRUCTIONS = 4  # batches of them

Answer = TypeVar("Answer")


class Kept(Generic[Answer]):
    """Every answer is of the names, or the key, that it was made for; others take its place."""

    def __init__(self) -> None:
        self._features: tuple[tuple[str, ...], Tensor] | None = None
        self._pieces: tuple[tuple[str, ...], Tensor] | None = None
        self._finder: tuple[tuple[str, ...], MentionFinder] | None = None
        self._asked: dict[Any, Answer] = {}

    def forget_features(self) -> None:
        """To be called where weights may change: features of names are not of these weights any more."""
        self._features = None

    def features(self, names: tuple[str, ...], device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """[V, C], text features of the names."""
        if self._features is None or self._features[0] != names or self._features[1].device != device:
            self._features = names, make()
        return self._features[1]

    def pieces(self, names: tuple[str, ...], tokenizer: Tokenizer) -> Tensor:
        """The LLM's, padded [V, T]."""
        if self._pieces is None or self._pieces[0] != names:
            self._pieces = names, tokenizer.word_ids(names)
        return self._pieces[1]

    def finder(self, names: tuple[str, ...], tokenizer: Tokenizer) -> MentionFinder:
        """Of the names in texts."""
        if self._finder is None or self._finder[0] != names:
            self._finder = names, MentionFinder(names, tokenizer)
        return self._finder[1]

    def asked(self, key: Any, make: Callable[[], Answer]) -> Answer:
        """Of a batch of instructions; key: all that decides the answer."""
        found = self._asked.get(key)
        if found is None:
            found = make()
            if len(self._asked) >= KEPT_INSTRUCTIONS:
                self._asked.pop(next(iter(self._asked)), None)
            self._asked[key] = found
        return found
