"""GGUF files (ggml-org's specification, versions 2 and 3): their metadata, and their tensors one by one.

Nothing in a file is trusted: every length is held against what is left of the file before anything is made of
it, and every tensor must lie in the file, beside the others.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from visionllm.convert.gguf_blocks import KINDS, Kind, decode
from visionllm.convert.keys import ConvertError, Shape

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_DIMENSIONS, MAX_NESTING, MAX_ALIGNMENT = 4, 4, 1 << 20
# Metadata types: struct's letter; 8 is a string, 9 an array.
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its shape, rows first, its kind and the file's bytes from `start`."""

    shape: Shape
    kind: Kind
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) // self.kind.values * self.kind.bytes


class _Header:
    """Reads a header's fields one after the other and never beyond the file."""

    def __init__(self, data: mmap.mmap | bytes, where: str) -> None:
        self.data, self.where, self.at = data, where, 0

    def fail(self, problem: str) -> ConvertError:
        return ConvertError(f"{self.where}: {problem}")

    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, letter: str, what: str) -> Any:
        size = struct.calcsize("<" + letter)
        if self.left() < size:
            raise self.fail(f"the file ends within {what}")
        value = struct.unpack_from("<" + letter, self.data, self.at)[0]
        self.at += size
        return value

    def count(self, least_bytes: int, what: str) -> int:
        """A number of things, each of at least so many bytes."""
        number = self.take("Q", what)
        if number * least_bytes > self.left():
            raise self.fail(f"{what}: expected at most {self.left() // least_bytes}, got {number}")
        return number

    def string(self, what: str) -> str:
        length = self.count(1, f"the length of {what}")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error.reason}") from error

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind in SCALARS:
            return self.take(SCALARS[kind], what)
        if kind != ARRAY or depth == MAX_NESTING:
            raise self.fail(f"{what}: unknown type {kind}" if kind != ARRAY else f"{what}: nested too deep")
        inner = self.take("I", what)
        if inner in SCALARS:
            letter = SCALARS[inner]
            size = struct.calcsize("<" + letter)
            number = self.count(size, f"the length of {what}")
            values = struct.unpack_from(f"<{number}{letter}", self.data, self.at)
            self.at += number * size
            return list(values)
        number = self.count(8 if inner == STRING else 12, f"the length of {what}")
        return [self.value(inner, what, depth + 1) for _ in range(number)]


class GGUFFile:
    """A GGUF file, mapped into memory.

    Attributes:
        metadata: by key; strings, numbers, truth values and lists of them.
        places: of the tensors, by the file's own names.

    Raises:
        ConvertError: it is not such a file, or not a whole one, or a tensor is of a kind that KINDS has not.
    """

    def __init__(self, path: str | Path) -> None:
        self.where = str(path)
        try:
            with open(path, "rb") as file:
                # An empty file cannot be mapped.
                size = file.seek(0, 2)
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise ConvertError(f"{path}: cannot be read: {error.strerror}") from error
        header = _Header(self._data, self.where)
        if self._data[:4] != MAGIC:
            raise header.fail(f"expected a GGUF file, got one that begins with {bytes(self._data[:4])!r}")
        header.at = 4
        version = header.take("I", "the version")
        if version not in VERSIONS:
            known = " or ".join(map(str, VERSIONS))
            raise header.fail(f"version: expected {known} (little-endian), got {version}")
        tensors = header.count(24, "the number of tensors")
        pairs = header.count(13, "the number of metadata fields")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = header.string("a metadata key")
            if key in self.metadata:
                raise header.fail(f"metadata field {key!r} is there twice")
            self.metadata[key] = header.value(header.take("I", f"the type of {key!r}"), f"field {key!r}")
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise header.fail(f"general.alignment: expected a power of two, got {alignment!r}")
        self.places = self._read_places(header, tensors, alignment)

    @staticmethod
    def _read_places(header: _Header, count: int, alignment: int) -> dict[str, Place]:
        found: dict[str, Place] = {}
        for _ in range(count):
            name = header.string("a tensor's name")
            what = f"tensor {name!r}"
            if name in found:
                raise header.fail(f"{what} is there twice")
            dimensions = header.take("I", what)
            if not 1 <= dimensions <= MAX_DIMENSIONS:
                raise header.fail(f"{what}: expected 1 to {MAX_DIMENSIONS} dimensions, got {dimensions}")
            sizes = [header.take("Q", what) for _ in range(dimensions)]
            number = header.take("I", what)
            kind = KINDS.get(number)
            if kind is None:
                known = ", ".join(one.name for one in KINDS.values())
                raise header.fail(f"{what}: expected one of {known}, got type {number}")
            if 0 in sizes or sizes[0] % kind.values:
                raise header.fail(f"{what}: expected rows of a multiple of {kind.values} values, got {sizes}")
            offset = header.take("Q", what)
            if offset % alignment:
                raise header.fail(f"{what}: expected an offset of a multiple of {alignment}, got {offset}")
            found[name] = Place(tuple(reversed(sizes)), kind, offset)
        start = -(-header.at // alignment) * alignment
        available = max(0, len(header.data) - start)
        end, before = 0, ""
        for name, place in sorted(found.items(), key=lambda item: item[1].start):
            if place.start + place.bytes > available:
                raise header.fail(
                    f"tensor {name!r}: expected {place.bytes} bytes at {place.start}, got a file with "
                    f"{available} bytes of data: it is not whole"
                )
            if place.start < end:
                raise header.fail(f"tensors {before!r} and {name!r} overlap")
            end, before = place.start + place.bytes, name
        return {name: Place(p.shape, p.kind, start + p.start) for name, p in found.items()}

    def read(self, name: str) -> Tensor:
        """A copy, in F32's, F16's and BF16's own type, else in fp32."""
        place = self.places[name]
        raw = np.frombuffer(self._data, np.uint8, place.bytes, place.start)
        return decode(raw, place.kind).view(place.shape)
