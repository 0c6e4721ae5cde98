"""SentencePiece models (``tokenizer.model``): the default model's, and LLaMA's.

LLaMA's put a space before every text ("dummy prefix"): "dog" is read as "▁dog". Within a text that would be a
space too many, so parts behind others are read by a second processor, of the same pieces without that rule.
Such models read their texts behind <s>, the default model's do not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import sentencepiece

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
            bare = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise ValueError(f"{problem}not a SentencePiece model: {error}") from error
        self.has_dummy_prefix = self.processor.encode("a", out_type=str) != bare.encode("a", out_type=str)
        self._inner = bare if self.has_dummy_prefix else self.processor
        self.vocab_size: int = self.processor.vocab_size()
        self.bos = _id_or_none(self.processor.bos_id())
        self.eos = _id_or_none(self.processor.eos_id())
        self.before = (self.bos,) if self.has_dummy_prefix and self.bos is not None else ()
        self.after: tuple[int, ...] = ()
        controls = [i for i in range(self.vocab_size) if self.processor.is_control(i)]
        self._control = {self.processor.id_to_piece(i): i for i in controls}

    @property
    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self.model}

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._inner.encode(text))

    def encode_first(self, text: str) -> tuple[int, ...]:
        return tuple(self.processor.encode(text))

    def encode_marked(self, text: str) -> tuple[int, ...]:
        ids: list[int] = []
        for place, part in enumerate(split_at(text, self._control)):
            if part in self._control:
                ids.append(self._control[part])
            elif part:
                ids += self.encode(part) if place else self.encode_first(part)
        return tuple(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode(list(ids))


def _id_or_none(i: int) -> int | None:
    return i if i >= 0 else None


def split_at(text: str, marks: Sequence[str] | dict[str, int]) -> list[str]:
    """The text in parts, of which every second is one of the marks; the longest that fits counts."""
    if not marks:
        return [text]
    return re.split("(" + "|".join(map(re.escape, sorted(marks, key=len, reverse=True))) + ")", text)
