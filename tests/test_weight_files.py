"""A model's folder on the disk: whole, in shards or not, and nothing but what was written comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from visionllm.model.weight_files import INDEX, WeightsReader, WeightsWriter

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool, torch.float64)
TENSORS = {
    **{f"of.{str(dtype)[6:]}": torch.arange(-3, 4).to(dtype) for dtype in DTYPES},
    "transposed": torch.randn(5, 3).t(),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "large": torch.randn(700, 1000),  # larger than what is read at a time
}
FILES = {"config.json": b'{"a": 1}', "tokenizer.model": b"pieces"}


def write(folder: Path, tensors=TENSORS, files=FILES, **options) -> Path:
    with WeightsWriter(folder, **options) as writer:
        for name, data in files.items():
            writer.add_file(name, data)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return folder


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, bytes]]:
    with WeightsReader(folder) as reader:
        tensors = {name: reader.read(name) for name in reader.shapes}
        return tensors, {name: reader.file(name) for name in reader.files}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(params=["one file", "shards"])
def folder(request, tmp_path) -> Path:
    return write(tmp_path / "model", **({} if request.param == "one file" else {"shard_bytes": 100}))


def test_what_is_written_comes_back(folder):
    tensors, files = read(folder)
    assert files == FILES and tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    with WeightsReader(folder) as reader:
        assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
        assert reader.dtypes == {name: tensor.dtype for name, tensor in TENSORS.items()}


def test_other_programs_read_it(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"].keys() == TENSORS.keys()
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())


def test_the_same_tensors_give_the_same_bytes(folder, tmp_path):
    options = {"shard_bytes": 100} if (folder / INDEX).exists() else {}
    again = write(tmp_path / "again", **options)
    assert names(again) == names(folder)
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in names(folder))


def test_reading_into_a_place_converts(folder):
    with WeightsReader(folder) as reader:
        for name, tensor in TENSORS.items():
            for into in (
                torch.empty(tensor.shape, dtype=torch.float64),
                torch.empty(tensor.shape, dtype=tensor.dtype),
                torch.empty(tensor.shape[::-1], dtype=torch.float64).permute(tuple(range(tensor.ndim))[::-1]),
            ):
                assert reader.read(name, into) is into
                assert torch.equal(into, tensor.to(into.dtype)), name
        with pytest.raises(ValueError, match=r"large: expected shape \[1000, 700\], .*has \[700, 1000\]"):
            reader.read("large", torch.empty(1000, 700))
