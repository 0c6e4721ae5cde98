"""Text to token ids: SentencePiece pieces, then the class tokens <c0> … <c511>; prompts as padded batches.

`python -m visionllm.tokenizer --output FILE` trains the SentencePiece model on the instruction corpus and the
class names.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from visionllm.instruction import Instruction

IMAGE = -2  # stands where an image token goes
PADDING = -1
BOS, EOS = 1, 2  # begin and end of what the model writes
# What stands around every class name, the tuple of a box, and digits: one piece each.
SYMBOLS = ['":▁', ',▁"', '{"', '"}', "(c,▁x1,▁y1,▁x2,▁y2)", *"0123456789"]
# What the text encoder reads is cut to these many tokens; the LLM still reads all.
MAX_NAME_TOKENS, MAX_DESCRIPTION_TOKENS = 32, 512
# The wordings that pieces were learned from, the first of each task: new pieces do not fit trained weights.
CORPUS_WORDINGS = {
    "detection": 64, "segmentation": 5, "grounding": 4, "keypoints": 2, "captioning": 4, "vqa": 2,
}  # fmt: skip


@dataclass
class Prompts:
    """A batch of instructions as the network reads them; K is the largest class set's size.

    Attributes:
        ids: int64 [B, P]: pieces, class tokens, IMAGE in M consecutive places, PADDING at the end.
        name_index: int64 [B, P]: k at the tokens of class k's name and at its <ck>, −1 elsewhere.
        class_mask: bool [B, K], True where the prompt lists a class.
        names: int64 [U, N], the batch's distinct names, padded.
        name_row: int64 [B, K], the row of `names` of every listed class (0 where class_mask is False).
        description: int64 [B, D], the text before the first name and after the last <ck>, cut and padded.
    """

    ids: Tensor
    name_index: Tensor
    class_mask: Tensor
    names: Tensor
    name_row: Tensor
    description: Tensor

    def to(self, device: torch.device | str) -> Prompts:
        return Prompts(*(getattr(self, field).to(device) for field in self.__dataclass_fields__))

    def of(self, rows: Tensor) -> Prompts:
        """The prompts [n] alone; `names` stays whole."""
        ids, index, mask, row = (t[rows] for t in (self.ids, self.name_index, self.class_mask, self.name_row))
        return Prompts(ids, index, mask, self.names, row, self.description[rows])


class Tokenizer:
    """SentencePiece with the added class tokens behind its pieces.

    Args:
        model: the serialised SentencePiece model.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        if not model:
            raise ValueError("tokenizer: the SentencePiece model is empty")
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"tokenizer: not a SentencePiece model: {error}") from error
        self.vocab_size = self.processor.vocab_size()
        self.encode = lru_cache(maxsize=65536)(self._encode)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer: no SentencePiece model at {path}")
        return cls(path.read_bytes())

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.processor.encode(text))

    def encode_name(self, name: str) -> tuple[int, ...]:
        """A class name's pieces, those of running text, where a space stands before each word."""
        return self.encode(" " + name)

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode([i for i in ids if 0 <= i < self.vocab_size])

    def text_ids(self, texts: Sequence[str]) -> Tensor:
        """Running text without a picture, padded: int64 [B, T]; an `<image>` in it is left out."""
        return pad([self.encode(" ".join(text.replace("<image>", " ").split())) for text in texts], PADDING)

    def answer_ids(self, text: str) -> tuple[int, ...]:
        """<bos>, the text as the model writes it, <eos>."""
        return (BOS, *self.encode(text), EOS)

    def prompts(self, instructions: Sequence[Instruction], num_queries: int) -> Prompts:
        """Tokenises a batch; `<image>`, which every instruction has once, becomes num_queries places.

        Raises:
            ValueError: there is no instruction, or a text that is not one.
        """
        if not instructions:
            raise ValueError("tokenizer: expected at least one instruction")
        image = (IMAGE,) * num_queries
        ids: list[list[int]] = []
        name_index: list[list[int]] = []
        descriptions: list[list[int]] = []
        rows: dict[str, int] = {}
        name_rows: list[list[int]] = []
        for instruction in instructions:
            row_ids: list[int] = []
            row_index: list[int] = []
            description: list[int] = []
            segments = instruction.segments()
            # Quotes, colons and commas between the names say nothing, however they are typed.
            named = [place for place, segment in enumerate(segments) if segment.index is not None]
            class_set = range(named[0], named[-1]) if named else range(0)
            for place, segment in enumerate(segments):
                index = -1 if segment.index is None else segment.index
                pieces: tuple[int, ...]
                if segment.kind == "image":
                    pieces = image
                elif segment.kind == "name":
                    pieces = self.encode_name(instruction.classes[index])  # without the text's escapes
                elif segment.kind == "class_token":
                    pieces = (self.vocab_size + index,)
                else:
                    pieces = self.encode(segment.text)
                    if place not in class_set:
                        description.extend(pieces)
                row_ids.extend(pieces)
                row_index.extend([index] * len(pieces))
            ids.append(row_ids)
            name_index.append(row_index)
            descriptions.append(description[:MAX_DESCRIPTION_TOKENS])
            name_rows.append([rows.setdefault(name, len(rows)) for name in instruction.classes])
        names = [self.encode_name(name)[:MAX_NAME_TOKENS] for name in rows]
        class_rows = pad(name_rows, PADDING)
        return Prompts(
            ids=pad(ids, PADDING),
            name_index=pad(name_index, -1),
            class_mask=class_rows >= 0,
            names=pad(names, PADDING) if names else torch.full((1, 1), PADDING),
            name_row=class_rows.clamp(min=0),
            description=pad(descriptions, PADDING),
        )


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one int64 tensor [n, longest]; the longest counts at least one."""
    out = np.full((len(rows), max(1, max(map(len, rows), default=1))), value, np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def train_sentencepiece(sentences: Sequence[str], vocab_size: int) -> bytes:
    """Trains byte-pair pieces with byte fallback: no text is unknown. The same input gives the same bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=vocab_size, model_type="bpe",
        character_coverage=1.0, byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", split_digits=True, bos_id=1, eos_id=2, unk_id=0, pad_id=-1,
        user_defined_symbols=SYMBOLS, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def corpus() -> list[str]:
    """What to learn pieces from: wordings to train on, and every name often, so that names stay short."""
    from visionllm.data.scenes.backgrounds import COCO_NAMES
    from visionllm.data.scenes.glyphs import class_glyphs
    from visionllm.data.scenes.shapes import SHAPE_NAMES
    from visionllm.instruction import TRAIN_TEMPLATES
    from visionllm.instruction.render import unnamed_keypoint_templates

    wordings = {**TRAIN_TEMPLATES, "keypoints": unnamed_keypoint_templates()}
    sentences = [template.text for task, n in CORPUS_WORDINGS.items() for template in wordings[task][:n]]
    names = dict.fromkeys([*class_glyphs(), *SHAPE_NAMES, *COCO_NAMES])
    return sentences * 2 + [" " + name for name in names for _ in range(8)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m visionllm.tokenizer", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the SentencePiece model to write")
    parser.add_argument("--vocab-size", type=int, default=2048, help="pieces, bytes included")
    arguments = parser.parse_args(argv)
    arguments.output.write_bytes(train_sentencepiece(corpus(), arguments.vocab_size))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
