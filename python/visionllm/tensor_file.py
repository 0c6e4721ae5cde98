"""Tensors in a safetensors file that carries checksums: nothing comes back that was not written.

Layout (safetensors): u64 length of the header, the header as JSON, the data. Two entries of the header's
``__metadata__`` are ours, so that any safetensors reader still reads the file:

    checksums   {"tensor": "<hex>", ...}   CRC-32 of each tensor's bytes
    checksum    CRC-32 of the header itself, with eight zeros in its place

CRC-32 finds every damage of up to 32 neighbouring bits and any other but one in 2^32. Of what the standard
library has it is the fastest: 22 MB take 10 ms (SHA-1 15, SHA-256 22, BLAKE2b 57; AMD EPYC with SHA
instructions, one core, without them the others take three times as long).
"""

from __future__ import annotations

import json
import math
import os
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA, CHECKSUMS, CHECKSUM = "__metadata__", "checksums", "checksum"
LENGTH = 8  # bytes that hold the header's length; header and data begin at multiples of it
MOST_HEADER = 100_000_000  # bytes, as the safetensors library allows
CHUNK = 1 << 20  # bytes read and checked at a time, while they are in the cache


class NoChecksumsError(ValueError):
    """A file that may be whole or not: nothing in it tells."""


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Writes a file of these tensors; their checksums by name.

    The same tensors give the same bytes. Nothing is copied but what is not contiguous or not on the CPU, one
    tensor at a time. The file is not atomic by itself: see `visionllm.atomic_file`.

    Raises:
        ValueError: a tensor's type is none of DTYPES, or metadata uses a name that is ours.
        OSError: the disk is full, among others.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"{name}: expected one of {', '.join(map(str, NAMES))}, got {tensor.dtype}")
    metadata = dict(metadata or {})
    if CHECKSUM in metadata or CHECKSUMS in metadata:
        raise ValueError(f"metadata: {CHECKSUM} and {CHECKSUMS} are the file's own")
    # Wide types first, as the safetensors library does it: every tensor is aligned to its type.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    unknown = dict.fromkeys(order, "0" * 8)
    with open(path, "wb", buffering=0) as file:
        # Checksums are known once the data is written: the header is written twice, of the same length.
        _write(file, _header(tensors, order, metadata, unknown))
        checksums = {}
        for name in order:
            data = _bytes(tensors[name].detach().cpu().contiguous())
            checksum = 0
            for start in range(0, len(data), CHUNK):
                chunk = data[start : start + CHUNK]
                checksum = zlib.crc32(chunk, checksum)
                _write(file, chunk)
            checksums[name] = f"{checksum:08x}"
        file.seek(0)
        _write(file, _header(tensors, order, metadata, checksums))
    return checksums


def sealed(text: bytes) -> bytes:
    """JSON that has ``"checksum":"00000000"`` in it, with its checksum there."""
    return text.replace(_seal("0" * 8), _seal(f"{zlib.crc32(text):08x}"), 1)


def is_sealed(text: bytes, checksum: object) -> bool:
    """Whether the JSON is as `sealed` made it, where ``checksum`` is what it says."""
    seal = _seal(str(checksum))
    return text.count(seal) == 1 and sealed(text.replace(seal, _seal("0" * 8))) == text


def _seal(checksum: str) -> bytes:
    return f'"{CHECKSUM}":"{checksum}"'.encode()


def _header(
    tensors: Mapping[str, Tensor], order: list[str], metadata: dict[str, str], checksums: dict[str, str]
) -> bytes:
    ours = {CHECKSUM: "0" * 8, CHECKSUMS: json.dumps(checksums, separators=(",", ":"))}
    entries: dict[str, Any] = {METADATA: ours | metadata}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = sealed(json.dumps(entries, separators=(",", ":")).encode())
    text += b" " * (-len(text) % LENGTH)
    return len(text).to_bytes(LENGTH, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    # Files are little-endian; so is every machine that torch's wheels are built for.
    if sys.byteorder != "little":
        raise OSError("weight files need a little-endian machine")
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _write(file: Any, data: bytes | memoryview) -> None:
    data = memoryview(data)
    while len(data):  # a raw file may take a part
        data = data[file.write(data) :]


class TensorFile:
    """A file of `write_tensors`, open for reading; use it in a ``with`` statement.

    Attributes:
        shapes, dtypes, checksums: by tensor name.
        metadata: what the writer gave.
        checked: whether there are checksums.

    Args:
        unchecked: accept a file without checksums; whatever other library wrote it.

    Raises:
        ValueError: not such a file, truncated or damaged in its header; NoChecksumsError: without checksums.
    """

    def __init__(self, path: str | os.PathLike[str], unchecked: bool = False) -> None:
        self.path = Path(path)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            self._read_header(unchecked)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """A tensor, of the file's type or, converted, in the place given.

        A type with another layout is converted 1 MiB at a time. After an error, ``into`` holds anything.

        Raises:
            KeyError: no such tensor.
            ValueError: its bytes are not those that were written, or ``into`` has another shape.
        """
        shape, dtype = self.shapes[name], self.dtypes[name]
        if into is None:
            into = torch.empty(shape, dtype=dtype)
        if tuple(into.shape) != shape:
            raise ValueError(
                f"{self.path}: {name}: expected shape {list(into.shape)}, the file has {list(shape)}"
            )
        target = into if into.is_contiguous() else torch.empty(shape, dtype=dtype)
        with torch.no_grad():
            self._fill(name, target.detach().reshape(-1), dtype)
            if target is not into:
                into.detach().copy_(target)
        return into

    def _fill(self, name: str, target: Tensor, dtype: torch.dtype) -> None:
        """Reads into a flat tensor of any type and device, and checks."""
        direct = target.dtype == dtype and target.device.type == "cpu"
        size, step = self._ends[name] - self._starts[name], CHUNK // dtype.itemsize
        buffer = target if direct else torch.empty(min(step, target.numel()), dtype=dtype)
        memory = _bytes(buffer)
        self._file.seek(self._starts[name])
        checksum = 0
        for start in range(0, size, CHUNK):
            length = min(CHUNK, size - start)
            chunk = memory[start : start + length] if direct else memory[:length]
            self._read_into(chunk, name)
            checksum = zlib.crc32(chunk, checksum)
            if not direct:
                first, count = start // dtype.itemsize, length // dtype.itemsize
                target[first : first + count].copy_(buffer[:count])
        expected = self.checksums.get(name)
        if expected is not None and f"{checksum:08x}" != expected:
            raise ValueError(
                f"{self.path}: {name}: damaged: expected checksum {expected}, got {checksum:08x}"
            )

    def _read_into(self, chunk: memoryview, name: str) -> None:
        while len(chunk):
            count = self._file.readinto(chunk)
            if not count:
                raise ValueError(f"{self.path}: {name}: the file ends within it")
            chunk = chunk[count:]

    def _read_header(self, unchecked: bool) -> None:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(LENGTH), "little")
        if size < LENGTH or length > min(MOST_HEADER, size - LENGTH):
            raise ValueError(
                f"{self.path}: not a safetensors file, or truncated: {size} bytes, and a header of {length}"
            )
        text = self._file.read(length)
        try:
            entries = json.loads(text)
            metadata = entries.pop(METADATA, {})
            self.shapes = {name: tuple(map(_count, entry["shape"])) for name, entry in entries.items()}
            self.dtypes = {name: DTYPES[entry["dtype"]] for name, entry in entries.items()}
            spans = {name: tuple(map(_count, entry["data_offsets"])) for name, entry in entries.items()}
            checksum = metadata.pop(CHECKSUM, None)
            self.checksums: dict[str, str] = json.loads(metadata.pop(CHECKSUMS, "{}"))
            self.metadata: dict[str, str] = metadata
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"{self.path}: not a safetensors file: its header is none: {error!r}") from error
        self.checked = checksum is not None or bool(self.checksums)
        if not self.checked:
            if not unchecked:
                raise NoChecksumsError(f"{self.path}: has no checksums")
        elif not is_sealed(text.rstrip(b" "), checksum):
            raise ValueError(f"{self.path}: damaged: its header is not the one that was written")
        elif self.checksums.keys() != self.shapes.keys():
            raise ValueError(f"{self.path}: damaged: its checksums are not those of its tensors")
        data, end = LENGTH + length, 0
        for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
            if start != end or stop - start != math.prod(self.shapes[name]) * self.dtypes[name].itemsize:
                raise ValueError(
                    f"{self.path}: not a safetensors file: {name} lies at {start} to {stop} with shape "
                    f"{list(self.shapes[name])} and {self.dtypes[name]}, the one before ends at {end}"
                )
            end = stop
        if data + end != size:
            last = max(spans, key=lambda name: spans[name], default="nothing")
            raise ValueError(
                f"{self.path}: truncated, or not a safetensors file: {size} bytes, expected {data + end}, "
                f"the last of them {last}"
            )
        self._starts = {name: data + start for name, (start, _) in spans.items()}
        self._ends = {name: data + stop for name, (_, stop) in spans.items()}


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or an infinity."""
    if not tensor.is_floating_point():
        return True
    # In pieces, as a sum in fp32 first makes an fp32 copy of other types. It is four times as fast as looking
    # at every value; a sum that overflows decides nothing.
    return all(
        bool(torch.isfinite(piece.sum(dtype=torch.float32))) or bool(torch.isfinite(piece).all())
        for piece in tensor.detach().reshape(-1).split(CHUNK // 4)
    )


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a count, got {value!r}")
    return value
