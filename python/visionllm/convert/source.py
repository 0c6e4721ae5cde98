"""Where published weights come from: safetensors files, sharded folders, and pickles if one asks for them.

A source knows the shapes of its tensors and reads one tensor at a time, so that a model is never held twice.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visionllm.convert.keys import ConvertError, Shape

INDEX_END = ".index.json"
# In a folder, the first of these that is there. Adapters last: their folders hold no model of their own.
SAFETENSORS_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors")
PICKLE_NAMES = ("pytorch_model.bin", "adapter_model.bin")
PICKLE_ENDS = (".bin", ".pth", ".pt", ".pickle", ".pkl")
# Checkpoints of training runs keep the weights under one of these.
NESTED = ("state_dict", "model", "model_state_dict")


class Source(Protocol):
    """Named tensors, read one by one.

    Attributes:
        shapes: of every tensor, known without reading any.
    """

    shapes: dict[str, Shape]

    def read(self, name: str) -> Tensor:
        """Raises KeyError for a name that is not in `shapes`."""
        ...


class TensorSource:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name].detach()


class SafetensorsSource:
    """One safetensors file, or the shards of one model.

    Args:
        files: whose tensors together are the model's.
        index: tensor name → file, of a sharded model; must agree with the files. None: what is in them.

    Raises:
        ConvertError: a file is missing or broken, a name stands in two files, or the index says otherwise.
    """

    def __init__(self, files: list[Path], index: Mapping[str, Path] | None = None) -> None:
        self.shapes: dict[str, Shape] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()
        for file in files:
            try:
                handle = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            except FileNotFoundError as error:
                raise ConvertError(f"{file}: no such file") from error
            except (SafetensorError, OSError) as error:
                raise ConvertError(f"{file}: not a whole safetensors file: {error}") from error
            self._open[file] = handle
            for name in handle.keys():
                if name in self._file_of:
                    raise ConvertError(f"{file}: {name} is in {self._file_of[name].name} too")
                self._file_of[name] = file
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())
        if index is not None and dict(index) != self._file_of:
            differing = sorted(
                name for name in {*index, *self._file_of} if index.get(name) != self._file_of.get(name)
            )
            raise ConvertError(
                f"{files[0].parent}: the index and its files disagree about {len(differing)} tensors: "
                + ", ".join(differing[:20])
            )

    def read(self, name: str) -> Tensor:
        return self._open[self._file_of[name]].get_tensor(name)


class PickleSource:
    """Files of `torch.save`, read with ``weights_only``: tensors and plain containers, no code."""

    def __init__(self, files: list[Path]) -> None:
        tensors: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in _unpickled(file).items():
                if name in tensors:
                    raise ConvertError(f"{file}: {name} is in another file too")
                tensors[name] = tensor
        self._source = TensorSource(tensors)
        self.shapes = self._source.shapes

    def read(self, name: str) -> Tensor:
        return self._source.read(name)


def _unpickled(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ConvertError(f"{file}: no such file")
    try:
        # Mapped into memory where the format can be, so that what is not read takes none.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConvertError(f"{file}: not a whole file of tensors alone: {first_line}") from error
    for key in NESTED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state:
        raise ConvertError(f"{file}: expected tensors by name, got {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ConvertError(f"{file}: expected tensors by name, got {name!r}: {type(tensor).__name__}")
    return state


def open_source(path: str | Path, allow_pickle: bool = False) -> Source:
    """Opens a file, or a folder with one model in the layout of Hugging Face.

    Of a folder: the first of model.safetensors (or its index), adapter_model.safetensors, a single other
    .safetensors file, and with allow_pickle pytorch_model.bin (or its index) or a single other pickle.

    Args:
        allow_pickle: read files of `torch.save` (.bin, .pth, .pt) too, with weights_only.

    Raises:
        ConvertError: there is nothing to read, there is a choice, a file is broken, or only a pickle is there
            and allow_pickle is not given.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_of(path)
    if not path.is_file():
        raise ConvertError(f"{path}: no such file or folder")
    if path.name.endswith(INDEX_END):
        index = _read_index(path)
        files = sorted(set(index.values()))
        pickled = [file for file in files if file.suffix != ".safetensors"]
        if not pickled:
            return SafetensorsSource(files, index)
    elif path.suffix == ".safetensors":
        return SafetensorsSource([path])
    elif path.suffix in PICKLE_ENDS:
        files = pickled = [path]
    else:
        raise ConvertError(f"{path}: expected .safetensors, {INDEX_END} or {', '.join(PICKLE_ENDS)}")
    if not allow_pickle:
        raise ConvertError(
            f"{pickled[0]}: a pickle, which is read only if it is allowed (--allow-pickle); a .safetensors "
            "file is better"
        )
    return PickleSource(files)


def _weights_of(folder: Path) -> Path:
    """The one file that a folder's model begins with."""
    for names, ends in ((SAFETENSORS_NAMES, (".safetensors",)), (PICKLE_NAMES, PICKLE_ENDS)):
        for name in names:
            for candidate in (folder / (name + INDEX_END), folder / name):
                if candidate.is_file():
                    return candidate
        found = sorted(file for file in folder.iterdir() if file.suffix in ends)
        if len(found) == 1:
            return found[0]
        if found:
            raise ConvertError(
                f"{folder}: expected {names[0]} or one file ({', '.join(ends)}), got "
                + ", ".join(file.name for file in found[:20])
            )
    raise ConvertError(f"{folder}: no weights: expected {SAFETENSORS_NAMES[0]} or its index")


def _read_index(path: Path) -> dict[str, Path]:
    """Tensor name → file beside the index.

    Raises:
        ConvertError: not an index, or a file name that leads out of its folder.
    """
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        assert isinstance(weight_map, dict) and weight_map
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ConvertError(f'{path}: expected JSON with tensors\' files under "weight_map"') from error
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ConvertError(f"{path}: {name}: expected the name of a file beside it, got {file!r}")
    return {name: path.parent / file for name, file in weight_map.items()}


def read_config(folder: str | Path, model_types: tuple[str, ...] = ()) -> dict[str, Any]:
    """config.json of a folder in the layout of Hugging Face.

    Args:
        model_types: what its "model_type" may be; empty: anything.

    Raises:
        ConvertError: it is missing, not a JSON object, or of another model type.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConvertError(f"{path}: expected JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConvertError(f"{path}: expected a JSON object, got {type(values).__name__}")
    if model_types and values.get("model_type") not in model_types:
        raise ConvertError(
            f'{path}: expected "model_type" {" or ".join(map(repr, model_types))}, '
            f"got {values.get('model_type')!r}"
        )
    return values
