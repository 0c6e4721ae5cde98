"""Vocabularies: text to ids and back, from the files that published language models come with.

``sentencepiece_words`` reads ``tokenizer.model`` (the default model's, LLaMA's), ``json_words`` reads
``tokenizer.json`` (byte-level BPE, WordPiece) and BERT's ``vocab.txt``, ``gguf_words`` makes either from the
metadata of a GGUF file. Ids are the published ones and stay so; what a model adds has rows of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from visionllm.words.sentencepiece_words import SentencePieceWords

SENTENCEPIECE_FILE, JSON_FILE, VOCAB_FILE = "tokenizer.model", "tokenizer.json", "vocab.txt"
CONFIG_FILE = "tokenizer_config.json"


class Words(Protocol):
    """A vocabulary.

    A prompt is read in parts (text, names, image tokens). ``encode`` is for parts behind something else, and
    ``encode_first`` for the one that begins a text; they differ in vocabularies that put a space before a
    text (LLaMA's). The ids of parts are the whole text's unless a piece would have reached over a seam.

    Attributes:
        vocab_size: all ids are below it.
        bos, eos: ids at the begin and the end of what a model writes; None where the files name none.
        before, after: what every whole text stands between, such as BERT's [CLS] and [SEP].
        files: name → content; `open_words` makes an equal vocabulary of them in a folder.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def before(self) -> tuple[int, ...]: ...
    @property
    def after(self) -> tuple[int, ...]: ...
    @property
    def files(self) -> dict[str, bytes]: ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Plain text behind something else: a control token's name in it is text like any other."""
        ...

    def encode_first(self, text: str) -> tuple[int, ...]:
        """Plain text that begins a text."""
        ...

    def encode_marked(self, text: str) -> tuple[int, ...]:
        """A text, from its begin, in which control tokens are written by name, as chat templates do."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text that begins with these ids, without control tokens; half characters become U+FFFD."""
        ...


def open_words(path: str | Path, prefix: str = "") -> Words:
    """The vocabulary of a file (GGUF too), or of a folder in the layout of Hugging Face.

    Of a folder: tokenizer.model, else tokenizer.json, else vocab.txt. Names of the begin and end tokens come
    from tokenizer_config.json beside it.

    Args:
        prefix: before every file name, of folders with several vocabularies.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not what its name says.
        ImportError: all but tokenizer.model needs the package `tokenizers`.
    """
    path = Path(path)
    if path.is_dir():
        names = [prefix + name for name in (SENTENCEPIECE_FILE, JSON_FILE, VOCAB_FILE)]
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"tokenizer: {path} has no {names[0]} and no {names[1]}")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: no SentencePiece model or tokenizer.json at {path}")
    if path.suffix not in (".json", ".txt", ".gguf"):
        return SentencePieceWords(path.read_bytes(), str(path))
    if path.suffix == ".gguf":
        from visionllm.convert.gguf_file import GGUFFile
        from visionllm.words.gguf_words import gguf_words

        return gguf_words(GGUFFile(path).metadata, str(path))
    from visionllm.words.json_words import json_words_of_file

    return json_words_of_file(path, prefix)


__all__ = ["CONFIG_FILE", "JSON_FILE", "SENTENCEPIECE_FILE", "SentencePieceWords", "Words", "open_words"]
