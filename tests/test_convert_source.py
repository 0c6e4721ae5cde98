"""Sources: safetensors files and folders, shards and their index, pickles only if allowed; broken ones."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from visionllm.convert import ConvertError, open_source, read_config

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(3.0), "c": torch.ones(4).bfloat16()}


def same(source):
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        assert torch.equal(source.read(name), tensor) and source.read(name).dtype == tensor.dtype
    with pytest.raises(KeyError):
        source.read("d")


def write_shards(folder, index=None, end="safetensors", save=save_file):
    names = list(TENSORS)
    files = {f"model-{i + 1}-of-2.{end}": names[i::2] for i in range(2)}
    for file, inside in files.items():
        save({name: TENSORS[name] for name in inside}, folder / file)
    weight_map = {name: file for file, inside in files.items() for name in inside} | (index or {})
    name = "model.safetensors" if end == "safetensors" else "pytorch_model.bin"
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors", "own.safetensors"])
def test_one_file(tmp_path, name):
    save_file(TENSORS, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    same(open_source(tmp_path))
    same(open_source(str(tmp_path / name)))


def test_shards(tmp_path):
    write_shards(tmp_path)
    same(open_source(tmp_path))
    same(open_source(tmp_path / "model.safetensors.index.json"))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"d": "model-1-of-2.safetensors"}, "disagree about 1 tensors: d"),
        ({"b": "model-1-of-2.safetensors"}, "disagree about 1 tensors: b"),
        ({"d": "model-3-of-3.safetensors"}, "model-3-of-3.safetensors: no such file"),
        ({"d": "../model.safetensors"}, "expected the name of a file beside it"),
    ],
)
def test_an_index_that_is_wrong(tmp_path, index, message):
    write_shards(tmp_path, index)
    with pytest.raises(ConvertError, match=message):
        open_source(tmp_path)


def test_a_name_in_two_shards(tmp_path):
    write_shards(tmp_path)
    save_file(TENSORS, tmp_path / "model-2-of-2.safetensors")
    with pytest.raises(
        ConvertError, match=r"model-2-of-2.safetensors: .* is in model-1-of-2.safetensors too"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConvertError, match=r"model.safetensors.index.json: "):
        open_source(tmp_path)


@pytest.mark.parametrize("length", [0, 4, 40, -1])
def test_a_truncated_file(tmp_path, length):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ConvertError, match="not a whole safetensors file"):
        open_source(path)


def test_nothing_or_too_much_to_choose_from(tmp_path):
    with pytest.raises(ConvertError, match="no such file or folder"):
        open_source(tmp_path / "not there")
    with pytest.raises(ConvertError, match="no weights"):
        open_source(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ConvertError, match="expected .safetensors"):
        open_source(tmp_path / "model.onnx")
    for name in ("a", "b"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConvertError, match="a.safetensors, b.safetensors"):
        open_source(tmp_path)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_only_if_allowed(tmp_path, wrapped, legacy):
    path = tmp_path / "pytorch_model.bin"
    state = {"model": TENSORS, "epoch": 3} if wrapped else TENSORS
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    for where in (path, tmp_path):
        with pytest.raises(ConvertError, match="a pickle, which is read only if it is allowed"):
            open_source(where)
        same(open_source(where, allow_pickle=True))


def test_pickled_shards(tmp_path):
    write_shards(tmp_path, end="bin", save=torch.save)
    with pytest.raises(ConvertError, match="a pickle"):
        open_source(tmp_path)
    same(open_source(tmp_path, allow_pickle=True))


class Other:
    pass


@pytest.mark.parametrize("what", [Other(), {"a": Other()}, {"a": 1}, [1], {}])
def test_pickles_of_anything_else(tmp_path, what):
    torch.save(what, tmp_path / "x.pth")
    with pytest.raises(ConvertError, match="x.pth: "):
        open_source(tmp_path, allow_pickle=True)


def test_a_truncated_pickle(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConvertError, match="x.pth: not a whole file of tensors alone"):
        open_source(path, allow_pickle=True)


def test_safetensors_come_first(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    same(open_source(tmp_path, allow_pickle=True))


def test_config(tmp_path):
    with pytest.raises(ConvertError, match="config.json: cannot be read"):
        read_config(tmp_path)
    for text, message in (("{", "expected JSON"), ("[]", "expected a JSON object, got list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConvertError, match=message):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "vocab_size": 3}')
    assert read_config(tmp_path, ("bert",))["vocab_size"] == 3
    with pytest.raises(ConvertError, match="""expected "model_type" 'llama' or 'mistral', got 'bert'"""):
        read_config(tmp_path, ("llama", "mistral"))
