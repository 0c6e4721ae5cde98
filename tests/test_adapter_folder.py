"""What was trained, apart from its base: put together again it is the trained model, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_network import NAMES, pictures, small_network

from visionllm.cli import main
from visionllm.instruction import Instruction
from visionllm.model.adapter_folder import write_adapter
from visionllm.model.network import Network
from visionllm.pipeline import load

CHANGED = ("llm.layers.0.q.lora_b", "slot_head.no_object", "image_tokenizer.level")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and a model that was trained from it."""
    root = tmp_path_factory.mktemp("adapter")
    network = small_network()
    network.save_pretrained(root / "base")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in CHANGED:
                parameter += 0.25  # exact in bfloat16 too, if rounded
                parameter.copy_(parameter.bfloat16())
    network.config = dataclasses.replace(network.config, score_threshold=0.125)
    network.known_names = ("dog", "cat")
    network.save_pretrained(root / "model")
    return root


def test_a_round_trip(folders, tmp_path):
    base, model, output = (str(path) for path in (folders / "base", folders / "model", tmp_path / "a"))
    assert main(["adapter", "--base", base, "--model", model, "--output", output, "--dtype", "bfloat16"]) == 0
    trained = Network.from_pretrained(folders / "model")
    loaded = load(folders / "base", device="cpu", adapter=tmp_path / "a")
    assert loaded.threshold == 0.125 and loaded.network.known_names == ("dog", "cat")
    for name, tensor in trained.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], tensor), name
    asked = [Instruction(classes=NAMES)]
    for one, other in zip(
        trained.find(pictures(1), asked), loaded.network.find(pictures(1), asked), strict=True
    ):
        assert torch.equal(one.scores, other.scores)


def test_only_what_differs_is_in_it(folders, tmp_path):
    count, size = write_adapter(folders / "base", folders / "model", tmp_path / "a")
    values = sum(Network.from_pretrained(folders / "base").state_dict()[name].numel() for name in CHANGED)
    assert count == len(CHANGED) and size == 4 * values


def test_another_base_is_refused(folders, tmp_path):
    write_adapter(folders / "base", folders / "model", tmp_path / "a")
    small_network(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="belongs to another base"):
        load(tmp_path / "other", device="cpu", adapter=tmp_path / "a")


def test_a_model_of_another_shape_has_no_adapter(folders, tmp_path):
    small_network(lora_rank=3).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="tensors have other shapes.*lora_a"):
        write_adapter(folders / "base", tmp_path / "other", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_damaged_adapter_is_refused(folders, tmp_path):
    write_adapter(folders / "base", folders / "model", tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        load(folders / "base", device="cpu", adapter=tmp_path / "a")
