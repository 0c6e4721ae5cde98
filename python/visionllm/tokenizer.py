"""Text to token ids: the LLM's words, then the class tokens <c0> … <c511>; prompts as padded batches.

The text encoder reads the LLM's words too, or has words of its own (BERT's).

`python -m visionllm.tokenizer --output FILE` trains the default model's SentencePiece model on the
instruction corpus and the class names.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from visionllm.atomic_file import replacing
from visionllm.instruction import Instruction
from visionllm.words import CONFIG_FILE, JSON_FILE, SENTENCEPIECE_FILE, SentencePieceWords, Words, open_words

IMAGE = -2  # stands where an image token goes
PADDING = -1
TEXT_PREFIX = "text_"  # before the file names of the text encoder's own words in a model folder
# What stands around every class name, the tuple of a box, and digits: one piece each.
SYMBOLS = ['":▁', ',▁"', '{"', '"}', "(c,▁x1,▁y1,▁x2,▁y2)", *"0123456789"]
# What the text encoder reads is cut to these many tokens, [CLS] and [SEP] included; the LLM still reads all.
MAX_NAME_TOKENS, MAX_DESCRIPTION_TOKENS = 32, 512
# The wordings that pieces were learned from, the first of each task: new pieces do not fit trained weights.
CORPUS_WORDINGS = {
    "detection": 64, "segmentation": 5, "grounding": 4, "keypoints": 2, "captioning": 4, "vqa": 2,
}  # fmt: skip


@dataclass
class Prompts:
    """A batch of instructions as the network reads them; K is the largest class set's size.

    Attributes:
        ids: int64 [B, P], the LLM's: pieces, class tokens, IMAGE in M consecutive places, PADDING last.
        name_index: int64 [B, P]: k at the tokens of class k's name and at its <ck>, −1 elsewhere.
        class_mask: bool [B, K], True where the prompt lists a class.
        names: int64 [U, N], the text encoder's: the batch's distinct names, padded.
        name_row: int64 [B, K], the row of `names` of every listed class (0 where class_mask is False).
        description: int64 [B, D], the text encoder's: the text before the first name and after the last
            <ck>, cut and padded.
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
    """The LLM's words with the added class tokens behind them, and the text encoder's.

    Ids of both are those of their files, whatever is added: class token k is id vocab_size + k in
    `Prompts.ids` alone, and its row is in an embedding of its own, which published embeddings do not touch.

    A text encoder with words of its own reads what they put around a whole text: of BERT, names and
    descriptions are "[CLS] text [SEP]". A name's feature is the mean over all its tokens, those two included,
    which is how MiniLM was trained to be read.

    Args:
        words: the LLM's, or a serialised SentencePiece model.
        text_words: the text encoder's own; None: it reads the LLM's.

    Raises:
        ValueError: words that name no token to begin and end what is written with.
    """

    def __init__(self, words: Words | bytes, text_words: Words | None = None) -> None:
        self.words = SentencePieceWords(words) if isinstance(words, bytes) else words
        if self.words.bos is None or self.words.eos is None:
            raise ValueError(
                "tokenizer: the LLM's words must name a bos and an eos token, got "
                f"{self.words.bos} and {self.words.eos} (tokenizer_config.json says them of a tokenizer.json)"
            )
        self.bos: int = self.words.bos
        self.eos: int = self.words.eos
        self.vocab_size = self.words.vocab_size
        self.text_words = text_words
        self.text_vocab_size = self.vocab_size if text_words is None else text_words.vocab_size
        self.encode = lru_cache(maxsize=65536)(self.words.encode)
        self.encode_first = lru_cache(maxsize=65536)(self.words.encode_first)
        # Around what the text encoder reads, and the same two for it.
        self._around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._text_encode, self._text_encode_first = self.encode, self.encode_first
        if text_words is not None:
            self._around = text_words.before, text_words.after
            self._text_encode = lru_cache(maxsize=65536)(text_words.encode)
            self._text_encode_first = lru_cache(maxsize=65536)(text_words.encode_first)

    @classmethod
    def from_file(cls, path: str | Path, text_path: str | Path | None = None) -> Tokenizer:
        """Of a tokenizer.model or tokenizer.json, or a folder with one, and the text encoder's if it has one.

        Raises:
            FileNotFoundError, ValueError, ImportError: as `visionllm.words.open_words`.
        """
        return cls(open_words(path), None if text_path is None else open_words(text_path))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Of a model folder: what `save` wrote. Raises as `from_file`."""
        folder = Path(folder)
        own = any((folder / name).is_file() for name in _names(TEXT_PREFIX))
        return cls(open_words(folder), open_words(folder, TEXT_PREFIX) if own else None)

    @property
    def files(self) -> dict[str, bytes]:
        """What a model folder holds of it: file name → content."""
        own = {} if self.text_words is None else self.text_words.files
        return {**self.words.files, **{TEXT_PREFIX + name: data for name, data in own.items()}}

    def save(self, folder: str | Path) -> None:
        """Writes `files`, each whole or not at all, and removes those of another tokenizer."""
        files = self.files
        for name, data in files.items():
            with replacing(Path(folder) / name) as part:
                part.write_bytes(data)
        for name in {*_names(), *_names(TEXT_PREFIX)} - files.keys():
            (Path(folder) / name).unlink(missing_ok=True)

    def encode_name(self, name: str) -> tuple[int, ...]:
        """A class name's pieces for the LLM, those of running text, where a space stands before each word."""
        return self.encode(" " + name)

    def decode(self, ids: Sequence[int]) -> str:
        """What the LLM has written; ids that are no words are left out."""
        return self.words.decode([i for i in ids if 0 <= i < self.vocab_size])

    def name_ids(self, names: Iterable[str]) -> Tensor:
        """Names as the text encoder reads them, cut and padded: int64 [U, N]."""
        return pad([self._text_name(name) for name in names], PADDING)

    def word_ids(self, names: Iterable[str]) -> Tensor:
        """Names as the LLM reads them, cut and padded: int64 [U, N]."""
        return pad([self.encode_name(name)[:MAX_NAME_TOKENS] for name in names], PADDING)

    def _text_name(self, name: str) -> Sequence[int]:
        return self._whole(self._text_encode(" " + name), MAX_NAME_TOKENS)

    def _whole(self, pieces: Sequence[int], most: int) -> Sequence[int]:
        """Pieces as a whole text of the text encoder's, of at most so many tokens."""
        if self.text_words is None:
            return pieces[:most]
        before, after = self._around
        return (*before, *pieces[: most - len(before) - len(after)], *after)

    def text_ids(self, texts: Sequence[str]) -> Tensor:
        """Running text without a picture, for the LLM, padded: int64 [B, T]; an `<image>` is left out."""
        rows = [self.encode_first(" ".join(text.replace("<image>", " ").split())) for text in texts]
        return pad([self.words.before + row for row in rows], PADDING)

    def answer_ids(self, text: str) -> tuple[int, ...]:
        """<bos>, the text as the model writes it, <eos>."""
        return (self.bos, *self.encode_first(text), self.eos)

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
        descriptions: list[Sequence[int]] = []
        rows: dict[str, int] = {}
        name_rows: list[list[int]] = []
        for instruction in instructions:
            row_ids: list[int] = list(self.words.before)
            row_index: list[int] = [-1] * len(row_ids)
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
                    pieces = (self.encode if place else self.encode_first)(segment.text)
                    if place not in class_set:
                        description.extend(
                            pieces
                            if self.text_words is None
                            else (self._text_encode if place else self._text_encode_first)(segment.text)
                        )
                row_ids.extend(pieces)
                row_index.extend([index] * len(pieces))
            ids.append(row_ids)
            name_index.append(row_index)
            descriptions.append(self._whole(description, MAX_DESCRIPTION_TOKENS))
            name_rows.append([rows.setdefault(name, len(rows)) for name in instruction.classes])
        class_rows = pad(name_rows, PADDING)
        return Prompts(
            ids=pad(ids, PADDING),
            name_index=pad(name_index, -1),
            class_mask=class_rows >= 0,
            names=self.name_ids(rows) if rows else torch.full((1, 1), PADDING),
            name_row=class_rows.clamp(min=0),
            description=pad(descriptions, PADDING),
        )


def _names(prefix: str = "") -> list[str]:
    """Of the files of one vocabulary in a model folder, any of which may be there."""
    return [prefix + name for name in (SENTENCEPIECE_FILE, JSON_FILE, CONFIG_FILE)]


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
