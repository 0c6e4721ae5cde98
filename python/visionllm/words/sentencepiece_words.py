"""SentencePiece models (``tokenizer.model``): the default model's, and LLaMA's.

LLaMA's put a space before every text ("dummy prefix"): "dog" is read as "▁dog". Within a text that would be a
space too many, so parts behind others are read by a second processor, of the same pieces without that rule.
Such models read their texts behind <s>, the default model's do not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import sentencepiece

if TYPE_CHECKING:
    from visionllm.words import Words

# ModelProto.normalizer_spec.add_dummy_prefix = false, as it stands in a serialised model. What is appended to
# one is merged into it and wins; not every version of the package can switch the rule by a call.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceWords:
    """A SentencePiece model; see `visionllm.words.Words`.

    Args:
        model: the serialised model.
        where: what errors call it.

    Raises:
        ValueError: it is empty or not a SentencePiece model.
    """

    def __init__(self, model: bytes, where: str = "") -> None:
        self.model = model
        problem = f"tokenizer: {where}: " if where else "tokenizer: "
        if not model:
            raise ValueError(f"{problem}the SentencePiece model is empty")
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{problem}not a SentencePiece model: {error}") from error
        self.has_dummy_prefix = self.processor.encode("a", out_type=str)[0].startswith("▁")
        self._inner = self.processor
        if self.has_dummy_prefix:
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        self.vocab_size: int = self.processor.vocab_size()
        self.bos = _id_or_none(self.processor.bos_id())
        self.eos = _id_or_none(self.processor.eos_id())
        self.before = (self.bos,) if self.has_dummy_prefix and self.bos is not None else ()
        self.after: tuple[int, ...] = ()

    @property
    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self.model}

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._inner.encode(text))

    def encode_first(self, text: str) -> tuple[int, ...]:
        return tuple(self.processor.encode(text))

    def encode_marked(self, text: str) -> tuple[int, ...]:
        return encode_marked(self, text, self.control_tokens)

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Name → id."""
        ids = [i for i in range(self.vocab_size) if self.processor.is_control(i)]
        return {self.processor.id_to_piece(i): i for i in ids}

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode(list(ids))


def _id_or_none(i: int) -> int | None:
    return i if i >= 0 else None


def encode_marked(words: Words, text: str, marks: dict[str, int]) -> tuple[int, ...]:
    """The ids of the marks where they stand in a text, the longest that fits, and of what is between them."""
    pattern = "(" + "|".join(map(re.escape, sorted(marks, key=len, reverse=True))) + ")"
    ids: list[int] = []
    for place, part in enumerate(re.split(pattern, text) if marks else [text]):  # every second is a mark
        if place % 2:
            ids.append(marks[part])
        elif part:
            ids += words.encode(part) if place else words.encode_first(part)
    return tuple(ids)
