"""A model's folder: its weights and the files that belong to them, each with its checksum.

    model.safetensors                    all weights, where they fit one shard; or
    model-00001-of-00003.safetensors …   shards, and
    model.safetensors.index.json         which shard holds which tensor, in the layout of Hugging Face

A tensor may be stored rounded: "name" is int8 then, and row n of the tensor is row n of it times value n of
"name.rounded", fp32. Readers see one tensor of fp32.

The checksums of the folder's other files (config.json, the tokenizer, …) stand in the metadata of
model.safetensors or of the index. Those of the tensors stand in each file (`visionllm.tensor_file`) and, of
shards, in the index too: a shard of another model does not pass for one of these. A folder is written whole
or not at all.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zlib
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from visionllm.atomic_file import replacing_folder
from visionllm.model.base_linear import quantise_rows
from visionllm.tensor_file import NoChecksumsError, TensorFile, is_finite, is_sealed, sealed, write_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "config.json"
BASE = "base.json"  # in an adapter's folder alone (model/adapter_folder.py)
# Files that a new model in the same folder replaces or, where it has none, removes; others stay.
MODEL_FILES = (
    *(CONFIG, "tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    *("text_tokenizer.model", "text_tokenizer.json", "text_tokenizer_config.json", "known_names.txt"),
)
SHARD = re.compile(r"model-\d{5}(-of-\d{5})?\.safetensors")
SHARD_BYTES = 2_000_000_000  # what a writer holds in memory at most
ATTEMPTS = 5  # to open a folder that is being replaced
REWRITE = (
    "written before weights had them, or by another program. If you trust them: "
    "python -m visionllm.model.weight_files {}"
)
ROUNDED = ".rounded"  # behind the name of a tensor that is stored rounded: its rows' scales
FILES = "files"  # metadata: {"config.json": checksum, ...}


class WeightsWriter:
    """Writes a model's folder, whole or not at all; use it in a ``with`` statement.

    ::

        with WeightsWriter(folder) as writer:
            writer.add_file("config.json", text)
            writer.add("embedding.weight", tensor)

    At the end of the statement the folder takes the place of what was there in one step; files there that are
    no part of a model (README.md, .git) stay. On an exception all stays as it was. Tensors of one
    shard are held at a time.

    Args:
        shard_bytes: weights of more bytes are spread over several files. A larger tensor gets its own.
    """

    def __init__(self, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
        self.folder = Path(folder)
        self.shard_bytes = shard_bytes
        self._fresh: Path | None = None
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[dict[str, str]] = []  # checksums by tensor
        self._bytes = 0
        self._names: set[str] = set()
        self._files: dict[str, bytes] = {}

    def __enter__(self) -> WeightsWriter:
        self._replacing = replacing_folder(self.folder, keep=_is_foreign)
        self._fresh = self._replacing.__enter__()
        self._fresh.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self._finish()
            except BaseException as problem:
                self._replacing.__exit__(type(problem), problem, problem.__traceback__)
                raise
        self._pending.clear()
        self._replacing.__exit__(kind, error, trace)

    def add(self, name: str, tensor: Tensor, rounded: bool = False) -> None:
        """Adds a tensor, which must stay as it is until the end of the ``with`` statement or the next shard.

        Args:
            rounded: its rows to 8 bits; what is read is rounded to itself.

        Raises:
            ValueError: the name was there already, or the tensor holds NaN or an infinity.
        """
        if name in self._names:
            raise ValueError(f"{self.folder}: {name} is added twice")
        if not is_finite(tensor):  # also before rounding: int8 has no NaN, it would be lost
            raise ValueError(f"{self.folder}: not finite: {name}")
        if rounded:
            values, scales = quantise_rows(tensor.detach().flatten(1))
            self.add(name, values.view(tensor.shape))
            self.add(name + ROUNDED, scales)
            return
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._write_shard()
        self._names.add(name)
        self._pending[name] = tensor.detach()
        self._pending_bytes += size

    def add_file(self, name: str, data: bytes) -> None:
        """Adds another file; `WeightsReader.file` gives it back only as it was."""
        if Path(name).name != name or name in (WEIGHTS, INDEX) or SHARD.fullmatch(name):
            raise ValueError(f"{self.folder}: expected the name of a file beside the weights, got {name!r}")
        self._files[name] = data

    def _inside(self) -> Path:
        if self._fresh is None:
            raise ValueError("WeightsWriter: use it in a with statement")
        return self._fresh

    def _write_shard(self) -> None:
        file = self._inside() / f"model-{len(self._shards) + 1:05d}.safetensors"
        self._shards.append(write_tensors(file, self._pending, {"format": "pt"}))
        self._bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        fresh = self._inside()
        for name, data in self._files.items():
            (fresh / name).write_bytes(data)
        files = {name: _checksum(data) for name, data in sorted(self._files.items())}
        if not self._shards:
            write_tensors(fresh / WEIGHTS, self._pending, {"format": "pt", FILES: json.dumps(files)})
            return
        if self._pending:
            self._write_shard()
        weight_map: dict[str, str] = {}
        checksums: dict[str, str] = {}
        for number, shard in enumerate(self._shards, 1):
            name = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            (fresh / f"model-{number:05d}.safetensors").rename(fresh / name)
            weight_map |= dict.fromkeys(shard, name)
            checksums |= shard
        metadata = {"total_size": self._bytes, "checksum": "0" * 8, FILES: files, "checksums": checksums}
        index = {"metadata": metadata, "weight_map": weight_map}
        (fresh / INDEX).write_bytes(sealed(json.dumps(index, separators=(",", ":")).encode()))


class WeightsReader:
    """A model's folder, open for reading; use it in a ``with`` statement.

    All files are opened at once: a folder that is replaced meanwhile is read to the end as it was.

    Attributes:
        shapes: tuples by tensor name; dtypes: the same.
        files: checksums of the other files.

    Args:
        unchecked: accept weights without checksums, whoever wrote them.

    Raises:
        FileNotFoundError: no weights, or a file that belongs to them is missing.
        ValueError: a file is truncated, damaged in what describes its tensors, of another model or, unless
            ``unchecked``, without checksums.
    """

    def __init__(self, folder: str | Path, unchecked: bool = False) -> None:
        self.folder = Path(folder)
        self.unchecked = unchecked
        for _ in range(ATTEMPTS):
            self._stack = ExitStack()
            self._identity = self._held()
            try:
                self._open()
            except BaseException as error:
                again = isinstance(error, (ValueError, OSError)) and self.replaced
                self._stack.close()
                if again:
                    continue
                raise
            if not self.replaced:
                return
            self._stack.close()
        raise OSError(f"{self.folder}: replaced again and again while it was being read")

    def _held(self) -> tuple[int, int] | None:
        """As `_now`, of a folder that stays open: its number cannot become that of a folder made later."""
        if os.name == "posix":
            with suppress(FileNotFoundError, NotADirectoryError):
                descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
                self._stack.callback(os.close, descriptor)
                status = os.fstat(descriptor)
                return status.st_dev, status.st_ino
        return self._now()

    def _now(self) -> tuple[int, int] | None:
        """What tells this folder from others that were or will be at its path."""
        if not self.folder.is_dir():
            return None
        status = self.folder.stat()
        return status.st_dev, status.st_ino

    @property
    def replaced(self) -> bool:
        """Whether another folder stands at the path by now."""
        return self._now() != self._identity

    def _open(self) -> None:
        self._shard_of: dict[str, TensorFile] = {}
        if (self.folder / INDEX).is_file():
            self._open_shards(self.folder / INDEX)
        elif (self.folder / WEIGHTS).is_file():
            weights = self._tensor_file(WEIGHTS)
            self._shard_of = dict.fromkeys(weights.shapes, weights)
            self.files: dict[str, str] = json.loads(weights.metadata.get(FILES, "{}"))
        else:
            raise FileNotFoundError(f"{self.folder} has no {WEIGHTS}")
        self.shapes = {name: file.shapes[name] for name, file in self._shard_of.items()}
        self.dtypes = {name: file.dtypes[name] for name, file in self._shard_of.items()}
        self._rounded = {name.removesuffix(ROUNDED) for name in self._shard_of if name.endswith(ROUNDED)}
        for name in self._rounded:
            rows = self.shapes.pop(name + ROUNDED)
            kinds = self.dtypes.get(name), self.dtypes[name + ROUNDED]
            if kinds != (torch.int8, torch.float32) or self.shapes[name][:1] != rows:
                raise ValueError(
                    f"{self.where(name + ROUNDED)}: {name}{ROUNDED} {list(rows)} belongs to no int8 tensor "
                    f"of as many rows"
                )
            self.dtypes[name] = self.dtypes.pop(name + ROUNDED)
        self._data: dict[str, bytes] = {}
        for name in self.files:
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{self.folder} has no {name}, which belongs to its weights")
            self._data[name] = (self.folder / name).read_bytes()

    def _tensor_file(self, name: str) -> TensorFile:
        try:
            return self._stack.enter_context(TensorFile(self.folder / name, self.unchecked))
        except NoChecksumsError as error:
            raise NoChecksumsError(f"{error}: {REWRITE.format(self.folder)}") from error

    def _open_shards(self, path: Path) -> None:
        text = path.read_bytes()
        try:
            index = json.loads(text)
            metadata, weight_map = index.get("metadata") or {}, index["weight_map"]
            checksums, checksum = metadata.get("checksums", {}), metadata.get("checksum")
            self.files = metadata.get(FILES, {})
            names = sorted(set(weight_map.values()))
            if not all(SHARD.fullmatch(name) for name in names):
                raise ValueError(f"expected names of shards, got {names[:3]}")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path}: not an index of weights: {error!r}") from error
        if not checksums and checksum is None:
            if not self.unchecked:
                raise NoChecksumsError(f"{path}: has no checksums: {REWRITE.format(self.folder)}")
        elif not is_sealed(text, checksum):
            raise ValueError(f"{path}: damaged: it is not what was written")
        for name in names:
            expected = {tensor for tensor, shard in weight_map.items() if shard == name}
            if not (self.folder / name).is_file():
                raise FileNotFoundError(
                    f"{self.folder} has no {name}, which holds {min(expected)} and {len(expected) - 1} others"
                )
            file = self._tensor_file(name)
            for tensor in sorted(expected ^ file.shapes.keys()):
                holds = "lacks" if tensor in expected else "holds"
                raise ValueError(f"{file.path}: {holds} {tensor}, unlike {INDEX} says")
            for tensor in sorted(expected) if checksums else ():
                if file.checksums.get(tensor) != checksums.get(tensor):
                    raise ValueError(f"{file.path}: {tensor} is that of another model than {INDEX} describes")
            self._shard_of |= dict.fromkeys(file.shapes, file)

    def __enter__(self) -> WeightsReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """A tensor of the file's type or, converted, in the place given; see `TensorFile.read`.

        Raises:
            KeyError: no such tensor.
            ValueError: its bytes are not those that were written, or ``into`` has another shape.
        """
        if name not in self._rounded:
            return self.read_stored(name, into)
        if into is None:
            into = torch.empty(self.shapes[name])
        self.read_stored(name, into)
        scales = self.read_stored(name + ROUNDED).to(into.device)
        into.detach().mul_(scales.view(-1, *[1] * (into.ndim - 1)))
        return into

    @property
    def stored(self) -> list[str]:
        """The names of what stands in the files: those of `shapes` and the scales of rounded ones."""
        return list(self._shard_of)

    def read_stored(self, name: str, into: Tensor | None = None) -> Tensor:
        """As `read`, but a rounded tensor in int8, and scales under their own names."""
        return self._shard_of[name].read(name, into)

    def checksum(self, name: str) -> str:
        """A tensor's, as it stands in its file; the tensor is not read."""
        names = [name, name + ROUNDED] if name in self._rounded else [name]
        return "".join(self._shard_of[one].checksums[one] for one in names)

    def where(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._shard_of[name].path

    def file(self, name: str, editable: bool = False) -> bytes:
        """Another file of the folder, as it was written with the weights.

        Args:
            editable: one that was changed since is given with a warning.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is not as it was written.
        """
        path = self.folder / name
        if name not in self.files:
            if not self.unchecked:
                raise FileNotFoundError(f"{self.folder} has no {name} that belongs to its weights")
            return path.read_bytes()
        if _checksum(self._data[name]) != self.files[name]:
            problem = f"{path}: is not what was written with the weights"
            if not editable:
                raise ValueError(f"{problem}: damaged, or of another model")
            accept = f"python -m visionllm.model.weight_files {self.folder}"
            warnings.warn(f"{problem}: edited, or damaged. If it is as it should be: {accept}", stacklevel=3)
        return self._data[name]


def _checksum(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def _is_foreign(name: str) -> bool:
    return name not in (WEIGHTS, INDEX, *MODEL_FILES) and not SHARD.fullmatch(name)


def rewrite(folder: str | Path) -> None:
    """Gives a folder that has none its checksums, and one with an edited config.json new ones.

    Every tensor stays as it is, bit for bit.

    Raises:
        ValueError: it is no such folder, or a tensor holds NaN or an infinity.
    """
    folder = Path(folder)
    with WeightsReader(folder, unchecked=True) as reader, WeightsWriter(folder) as writer:
        for name in MODEL_FILES:
            if name in reader.files:
                writer.add_file(name, reader.file(name, editable=name == CONFIG))
            elif (folder / name).is_file():
                writer.add_file(name, (folder / name).read_bytes())
        for name in reader.stored:
            writer.add(name, reader.read_stored(name))


if __name__ == "__main__":
    import sys

    for argument in sys.argv[1:]:
        rewrite(argument)
