"""The vocabulary that a GGUF file carries in its metadata, as SentencePiece model or as tokenizer.json.

    tokenizer.ggml.model "llama"  pieces with scores and types: a SentencePiece model of byte-pair pieces
    tokenizer.ggml.model "gpt2"   pieces and merges of a byte-level BPE; tokenizer.ggml.pre says how text is
                                  cut before merging
Keys: the GGUF specification of ggml-org.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from visionllm.words.json_words import JsonWords, added_token
from visionllm.words.sentencepiece_words import SentencePieceWords

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type, as SentencePiece numbers them
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def _cut_by(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, {**BYTE_LEVEL, "use_regex": False}]


_CONTRACTIONS_AND_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut before merging, by tokenizer.ggml.pre.
CUTS: dict[str, list[dict[str, Any]]] = {
    "default": [BYTE_LEVEL],
    "gpt-2": [BYTE_LEVEL],
    "smollm": [DIGITS, BYTE_LEVEL],
    "llama-bpe": _cut_by(rf"{_CONTRACTIONS_AND_WORDS}|\p{{N}}{{1,3}}|{_REST}"),
    "qwen2": _cut_by(rf"{_CONTRACTIONS_AND_WORDS}|\p{{N}}|{_REST}"),
}


def gguf_words(metadata: Mapping[str, Any], where: str = "GGUF") -> SentencePieceWords | JsonWords:
    """The vocabulary of a GGUF file.

    Args:
        metadata: the file's key-value pairs.
        where: what errors call it.

    Raises:
        ValueError: a key is missing, or says something else than expected.
    """
    model = _get(metadata, "model", str, where)
    tokens = [str(token) for token in _get(metadata, "tokens", Sequence, where)]
    types = [int(kind) for kind in metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))]
    if len(types) != len(tokens):
        raise ValueError(
            f"{where}: tokenizer.ggml.token_type must have {len(tokens)} values, got {len(types)}"
        )
    bos, eos = (_token(metadata, role, tokens, where) for role in ("bos", "eos"))
    if model == "llama":
        scores = [float(score) for score in _get(metadata, "scores", Sequence, where)]
        if len(scores) != len(tokens):
            raise ValueError(
                f"{where}: tokenizer.ggml.scores must have {len(tokens)} values, got {len(scores)}"
            )
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        named = {"bos": bos, "eos": eos, "unknown": _token(metadata, "unknown", tokens, where)}
        return SentencePieceWords(sentencepiece_model(tokens, scores, types, named, prefix), where)
    if model != "gpt2":
        raise ValueError(f"{where}: tokenizer.ggml.model must be 'llama' or 'gpt2', got {model!r}")
    cut = metadata.get("tokenizer.ggml.pre", "default")
    if cut not in CUTS:
        raise ValueError(f"{where}: tokenizer.ggml.pre must be of {', '.join(CUTS)}, got {cut!r}")
    merges = [str(merge) for merge in _get(metadata, "merges", Sequence, where)]
    before = [bos] if bos is not None and metadata.get("tokenizer.ggml.add_bos_token") else []
    return JsonWords(byte_level_json(tokens, merges, types, cut, before), bos, eos, where)


def _get(metadata: Mapping[str, Any], key: str, kind: Any, where: str) -> Any:
    key = f"tokenizer.ggml.{key}"
    if key not in metadata:
        raise ValueError(f"{where}: expected {key} in the metadata, got none")
    value = metadata[key]
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, kind) or (kind is Sequence and isinstance(value, str)):
        raise ValueError(f"{where}: {key} must be a {kind.__name__}, got {type(value).__name__}")
    return value


def _token(metadata: Mapping[str, Any], role: str, tokens: Sequence[str], where: str) -> str | None:
    key = f"tokenizer.ggml.{role}_token_id"
    if key not in metadata:
        return None
    i = int(metadata[key])
    if not 0 <= i < len(tokens):
        raise ValueError(f"{where}: {key} must be below {len(tokens)}, got {i}")
    return tokens[i]


def byte_level_json(
    tokens: Sequence[str],
    merges: Sequence[str],
    types: Sequence[int],
    cut: str = "default",
    before: Sequence[str] = (),
) -> bytes:
    """The tokenizer.json of a byte-level BPE.

    Args:
        tokens: by id, in the alphabet of bytes as letters; merges: two of them with a space between, by rank.
        types: CONTROL and USER_DEFINED tokens are found before the text is cut.
        cut: of `CUTS`.
        before: tokens that every text stands behind.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    added = [
        added_token(i, token, types[i] == CONTROL)
        for i, token in enumerate(tokens)
        if types[i] in (CONTROL, USER_DEFINED)
    ]
    around: list[dict[str, Any]] = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTS[cut]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*around, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [*around, *({"Sequence": {"id": part, "type_id": 0}} for part in "AB")],
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in before
            },
        },
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": cut == "llama-bpe", "vocab": ids, "merges": list(merges),
        },
    }  # fmt: skip
    return json.dumps(described, ensure_ascii=False).encode()


def sentencepiece_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    named: Mapping[str, str | None],
    dummy_prefix: bool = True,
) -> bytes:
    """A serialised SentencePiece model of byte-pair pieces with byte fallback, whose ids are the places.

    Written by hand in the protocol-buffer wire format (sentencepiece_model.proto), which needs no package.

    Args:
        named: the pieces that are "bos", "eos" and "unknown"; None: there is none, or it has its usual name.
        dummy_prefix: a space is put before every text.
    """
    model = b"".join(
        _message(1, _text(1, piece) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
        for piece, score, kind in zip(pieces, scores, types, strict=True)
    )
    trainer = _number(3, 2) + _number(4, len(pieces)) + _number(35, 1)  # model_type BPE, size, byte_fallback
    for role, id_field, piece_field in (("unknown", 40, 45), ("bos", 41, 46), ("eos", 42, 47)):
        if (name := named.get(role)) is not None:
            trainer += _number(id_field, list(pieces).index(name)) + _text(piece_field, name)
    # add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = _text(1, "identity") + _number(3, dummy_prefix) + _number(4, 0) + _number(5, 1)
    return model + _message(2, trainer) + _message(3, normalizer)


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())
