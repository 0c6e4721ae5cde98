"""How GGUF files store values: blocks of integers that share a scale (ggml's ``ggml-common.h``), or floats.

A value is scale · integer (+ minimum), in fp32; the K kinds scale in two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

VALUES_AT_ONCE = 1 << 22  # so that dequantising takes little memory beside its result

Blocks = np.ndarray  # uint8 [n, bytes of a block]


def _half(blocks: Blocks, at: int) -> np.ndarray:
    """fp16 at a byte of every block → fp32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[n, k] bytes → [n, 2k]: their low halves, then their high ones."""
    return np.concatenate([packed & 15, packed >> 4], -1)


def _bits(blocks: Blocks, at: int) -> np.ndarray:
    """Four bytes of every block → their bits [n, 32], the lowest first."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")


def _q4_0(blocks: Blocks) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Blocks) -> np.ndarray:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q5_0(blocks: Blocks) -> np.ndarray:
    q = _nibbles(blocks[:, 6:]) | _bits(blocks, 2) << 4
    return _half(blocks, 0) * (q.astype(np.float32) - 16)


def _q5_1(blocks: Blocks) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | _bits(blocks, 4) << 4) + _half(blocks, 2)


def _q8_0(blocks: Blocks) -> np.ndarray:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8)


def _scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The twelve bytes of Q4_K and Q5_K → eight scales and eight minima of 6 bits, [n, 8, 1] both."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], 1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], 1)
    return scales[..., None].astype(np.float32), minima[..., None].astype(np.float32)


def _k(blocks: Blocks, q: np.ndarray) -> np.ndarray:
    """Q4_K and Q5_K of their integers [n, 8, 32]."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scale, minimum = _half(blocks, 0)[..., None], _half(blocks, 2)[..., None]
    return (scale * scales * q - minimum * minima).reshape(len(blocks), -1)


def _q4_k(blocks: Blocks) -> np.ndarray:
    return _k(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: Blocks) -> np.ndarray:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # bit j: of values 32j …
    return _k(blocks, low | high << 4)


def _q6_k(blocks: Blocks) -> np.ndarray:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    q = (low | high << 4).reshape(-1, 16, 16).astype(np.float32) - 32
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)[..., None]
    return (_half(blocks, 208)[..., None] * scales * q).reshape(len(blocks), -1)


@dataclass(frozen=True)
class Kind:
    """How a tensor is stored: values and bytes of a block; what makes fp32 of blocks, or the type it has."""

    name: str
    values: int
    bytes: int
    decode: Callable[[Blocks], np.ndarray] | torch.dtype


KINDS = {
    0: Kind("F32", 1, 4, torch.float32),
    1: Kind("F16", 1, 2, torch.float16),
    2: Kind("Q4_0", 32, 18, _q4_0),
    3: Kind("Q4_1", 32, 20, _q4_1),
    6: Kind("Q5_0", 32, 22, _q5_0),
    7: Kind("Q5_1", 32, 24, _q5_1),
    8: Kind("Q8_0", 32, 34, _q8_0),
    12: Kind("Q4_K", 256, 144, _q4_k),
    13: Kind("Q5_K", 256, 176, _q5_k),
    14: Kind("Q6_K", 256, 210, _q6_k),
    30: Kind("BF16", 1, 2, torch.bfloat16),
}


def decode(raw: np.ndarray, kind: Kind) -> Tensor:
    """uint8 [bytes] → [values], a copy: in the type of F32, F16 and BF16, else in fp32."""
    if isinstance(kind.decode, torch.dtype):
        return torch.from_numpy(raw.copy()).view(kind.decode)
    blocks = raw.reshape(-1, kind.bytes)
    result = np.empty((len(blocks), kind.values), np.float32)
    step = VALUES_AT_ONCE // kind.values
    for first in range(0, len(blocks), step):
        result[first : first + step] = kind.decode(blocks[first : first + step])
    return torch.from_numpy(result).flatten()
