"""What a network keeps between calls: of the names it knows, and of the last instructions.

Pictures are mostly asked the same, one after the other, and the known names are the same for all of them.
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
        self._features: tuple[Any, Tensor] | None = None
        self._pieces: tuple[tuple[str, ...], Tensor] | None = None
        self._finder: tuple[tuple[str, ...], MentionFinder] | None = None
        self._asked: dict[Any, Answer] = {}

    def features(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """[V, C], text features of known names; key: all that decides them."""
        if self._features is None or self._features[0] != key:
            # A tensor made in inference could not train later.
            with torch.inference_mode(False), torch.no_grad():
                self._features = key, make()
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
