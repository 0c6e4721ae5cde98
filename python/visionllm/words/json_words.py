"""Vocabularies of the package `tokenizers`: ``tokenizer.json`` (SmolLM2, LLaMA 3, BERT), and ``vocab.txt``.

before, after  what the file's post-processor puts around a text: [CLS] and [SEP] of BERT, <s> of LLaMA
bos, eos       by name, from tokenizer_config.json, since tokenizer.json does not say them
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visionllm.words import CONFIG_FILE
from visionllm.words.sentencepiece_words import encode_marked


class JsonWords:
    """A tokenizer.json; see `visionllm.words.Words`. Its own padding and truncation are switched off.

    Args:
        data: the file's content.
        bos, eos: tokens at the begin and the end of what a model writes, by name.
        where: what errors call it.

    Raises:
        ValueError: not a tokenizer.json, or bos or eos is not in it.
        ImportError: the package `tokenizers` is missing.
    """

    def __init__(
        self, data: bytes, bos: str | None = None, eos: str | None = None, where: str = "tokenizer.json"
    ) -> None:
        self.data, self._names = data, {"bos_token": bos, "eos_token": eos}
        try:
            described = json.loads(data)
            assert isinstance(described, dict)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"tokenizer: {where}: expected a JSON object") from error
        self.tokenizer = _tokenizer(data.decode(), where)
        inner = without_prefix(described)
        self._inner = self.tokenizer if inner == described else _tokenizer(json.dumps(inner), where)
        self.vocab_size: int = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        self.bos, self.eos = self._id(bos, "bos", where), self._id(eos, "eos", where)
        self.before, self.after = self._around()
        added = self.tokenizer.get_added_tokens_decoder()
        self.control_tokens = {token.content: i for i, token in added.items() if token.special}

    def _id(self, token: str | None, role: str, where: str) -> int | None:
        if token is None:
            return None
        found: int | None = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"tokenizer: {where}: the {role} token {token!r} is not in the vocabulary")
        return found

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What stands before and after a text that is encoded whole."""
        encoding = self.tokenizer.encode("a")
        ids, is_control = encoding.ids, encoding.special_tokens_mask
        inside = [place for place, control in enumerate(is_control) if not control]
        if not inside:
            return tuple(ids), ()
        return tuple(ids[: inside[0]]), tuple(ids[inside[-1] + 1 :])

    @property
    def files(self) -> dict[str, bytes]:
        named = {role: name for role, name in self._names.items() if name is not None}
        files = {"tokenizer.json": self.data}
        if named:
            files[CONFIG_FILE] = json.dumps(named, indent=2, ensure_ascii=False).encode() + b"\n"
        return files

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_first(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_marked(self, text: str) -> tuple[int, ...]:
        return encode_marked(self, text, self.control_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def _tokenizer(text: str, where: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(
            f"{where}: reading it needs the package `tokenizers`: pip install 'visionllm[pretrained]'"
        ) from error
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"tokenizer: {where}: not a tokenizer.json: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # nobody writes control tokens by typing their names
    return tokenizer


def without_prefix(described: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json that does not put a space before a text."""
    described = copy.copy(described)
    for part in ("normalizer", "pre_tokenizer"):
        if described.get(part) is not None:
            described[part] = _part_without_prefix(described[part])
    return described


def _part_without_prefix(part: dict[str, Any]) -> dict[str, Any] | None:
    part = dict(part)
    kind = part.get("type")
    if kind == "Prepend":
        return None
    if kind == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        kept = [_part_without_prefix(one) for one in part.get(key, [])]
        part[key] = [one for one in kept if one is not None]
    elif kind == "Metaspace":
        if "prepend_scheme" in part:
            part["prepend_scheme"] = "never"
        if "add_prefix_space" in part:
            part["add_prefix_space"] = False
    elif kind == "ByteLevel":
        part["add_prefix_space"] = False
    return part


def json_words_of_file(path: Path, prefix: str = "") -> JsonWords:
    """tokenizer.json or vocab.txt, with the tokenizer_config.json beside it.

    Args:
        prefix: before the configuration's name.

    Raises:
        ValueError, ImportError: as `JsonWords`.
    """
    config_file = path.parent / (prefix + CONFIG_FILE)
    config: dict[str, Any] = {}
    if config_file.is_file():
        try:
            config = json.loads(config_file.read_bytes())
            assert isinstance(config, dict)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"tokenizer: {config_file}: expected a JSON object") from error
    data = path.read_bytes()
    if path.suffix == ".txt":
        if not isinstance(lower := config.get("do_lower_case", True), bool):
            raise ValueError(f"tokenizer: {config_file}: do_lower_case must be true or false, got {lower!r}")
        data = wordpiece_json(data.decode().splitlines(), lower, str(path))
    names = []
    for role in ("bos_token", "eos_token"):
        token = config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise ValueError(f"tokenizer: {config_file}: {role} must be a token's text, got {token!r}")
        names.append(token)
    return JsonWords(data, names[0], names[1], str(path))


def wordpiece_json(pieces: Sequence[str], lower_case: bool = True, where: str = "vocab.txt") -> bytes:
    """BERT's tokenizer.json of its vocab.txt, one piece a line, the line's number its id.

    Raises:
        ValueError: a token that BERT needs is not in it, or a piece stands there twice.
    """
    ids = {piece: i for i, piece in enumerate(pieces)}
    if len(ids) != len(pieces):
        raise ValueError(f"tokenizer: {where}: {len(pieces) - len(ids)} pieces stand there twice")
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in ids]
    if missing:
        raise ValueError(f"tokenizer: {where}: expected {', '.join(missing)} among the pieces")
    special = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in ids]
    single = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]
    second = [{"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}]
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(ids[token], token) for token in special],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
            "lowercase": lower_case,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing", "single": single, "pair": single + second,
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": ids,
        },
    }  # fmt: skip
    return json.dumps(described, ensure_ascii=False).encode()


def added_token(i: int, content: str, special: bool = True) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens."""
    sides = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, **sides, "special": special}
