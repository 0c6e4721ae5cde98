"""PEFT's LoRA: the same outputs, gradients and merged weights as its LoraModel; its folders in and out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llama_models import Llama, hugging_face_llama, llama_of, random_rows
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from visionllm.convert.keys import ConvertError
from visionllm.convert.llama import LAYER, hugging_face_tensors
from visionllm.convert.peft import read_adapter, write_adapter
from visionllm.ops import use_operators

OPERATORS = ["kernels", "reference"]
TARGETS = {"q": "q_proj", "v": "v_proj", "down": "down_proj"}
TOLERANCE = 1e-4  # of logits up to 10, in fp32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base model's."""
    hugging_face_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def peft_model(seed: int = 0, **changes):
    """On the model of the folder above; B is random too."""
    values = {"r": 4, "lora_alpha": 6, "target_modules": list(TARGETS.values()), "task_type": "CAUSAL_LM"}
    torch.manual_seed(seed)
    model = get_peft_model(hugging_face_llama(), LoraConfig(**{**values, **changes})).eval()
    torch.manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def with_own(folder: Path, rank: int = 4, alpha: float = 6.0, **changes) -> Llama:
    return llama_of(folder, lora_rank=rank, lora_alpha=alpha, lora_targets=tuple(TARGETS), **changes)


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long()).logits


@pytest.mark.parametrize("operators", OPERATORS)
def test_outputs_and_gradients(folder, tmp_path, operators):
    model = peft_model()
    model.save_pretrained(tmp_path / "adapter")
    llama = with_own(folder)
    llama.llm.set_own_adapter(read_adapter(tmp_path / "adapter"))
    ids = random_rows(13, 6)
    there = ids >= 0
    weight = torch.randn(*ids.shape, 97, generator=torch.Generator().manual_seed(2)) * there[..., None]
    expected = logits_of(model, ids)
    with use_operators(operators):
        found = llama(ids)
        (found * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (found - expected)[there].abs().max() < TOLERANCE
    compared = 0
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parts = name.split(".layers.")[1].split(".")  # 0.self_attn.q_proj.lora_A.default.weight
            mine = llama.llm.linears()[f"layers.{parts[0]}." + {v: k for k, v in TARGETS.items()}[parts[2]]]
            grad = mine.lora_a.grad if parts[3] == "lora_A" else mine.lora_b.grad
            torch.testing.assert_close(
                grad, parameter.grad, atol=1e-4 * float(parameter.grad.abs().max()), rtol=1e-3
            )
            compared += 1
    assert compared == 2 * 3 * len(TARGETS)


@torch.no_grad()
def test_merged_weights(folder, tmp_path):
    model = peft_model()
    model.save_pretrained(tmp_path / "adapter")
    llama = llama_of(folder)
    llama.llm.add_adapter("it", read_adapter(tmp_path / "adapter"))
    before = {name: t.clone() for name, t in hugging_face_tensors(llama).items()}
    llama.llm.merge("it")
    merged = model.merge_and_unload().state_dict()
    found = hugging_face_tensors(llama)
    for name, tensor in merged.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)
    llama.llm.unmerge()
    assert all(torch.equal(t, before[name]) for name, t in hugging_face_tensors(llama).items())


@torch.no_grad()
def test_several_in_a_batch_as_pefts_adapter_names(folder, tmp_path):
    """Ranks, targets and scales of their own, rank and alpha patterns, and rank-stabilised scales."""
    kinds = {
        "plain": {},
        "wide": {"r": 7, "target_modules": ["k_proj", "o_proj", "up_proj", "gate_proj"]},
        "stable": {"use_rslora": True, "layers_to_transform": [1, 2]},
        "pattern": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 9}},
    }
    llama, expected = llama_of(folder), {}
    ids = random_rows(9, 9, 9, 9, 9)
    for seed, (name, changes) in enumerate(kinds.items()):
        model = peft_model(10 * seed, **changes)
        model.save_pretrained(tmp_path / name)
        llama.llm.add_adapter(name, read_adapter(tmp_path / name))
        expected[name] = logits_of(model, ids)
    names = ["wide", None, "pattern", "stable", "plain"]
    found = llama(ids, names)
    for b, name in enumerate(names):
        wanted = logits_of(hugging_face_llama(), ids) if name is None else expected[name]
        assert (found[b] - wanted[b]).abs().max() < TOLERANCE
    assert (found[0] - found[1]).abs().max() > 0.1


@torch.no_grad()
def test_peft_loads_what_is_written(folder, tmp_path):
    llama = with_own(folder, rank=3, alpha=5.0)
    for linear in llama.llm.linears().values():
        if linear.lora_b is not None:
            torch.nn.init.normal_(linear.lora_b, std=0.2)
    write_adapter(tmp_path / "out", llama.llm.own_adapter(), "some/base", dropout=0.1)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["lora_alpha"] == 5 and config["base_model_name_or_path"] == "some/base"
    assert sorted(config["target_modules"]) == sorted(TARGETS.values()) and config["lora_dropout"] == 0.1
    model = PeftModel.from_pretrained(hugging_face_llama(), tmp_path / "out").eval()
    ids = random_rows(10, 4)
    assert (llama(ids) - logits_of(model, ids))[ids >= 0].abs().max() < TOLERANCE
    other = with_own(folder, rank=3, alpha=5.0)
    other.llm.set_own_adapter(read_adapter(tmp_path / "out"))
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 9}},
        {"use_rslora": True},
        {"layers_to_transform": [0, 2]},
        {"target_modules": r".*layers\.(0\.self_attn\.q_proj|2\.mlp\.up_proj)"},
    ],
    ids=["patterns", "stable", "some layers", "unequal layers"],
)
def test_round_trip(tmp_path, changes):
    model = peft_model(**changes)
    model.save_pretrained(tmp_path / "in")
    adapter = read_adapter(tmp_path / "in")
    write_adapter(tmp_path / "out", adapter)
    given, written = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("in", "out"))
    assert given.keys() == written.keys() and all(torch.equal(given[key], written[key]) for key in given)
    again = read_adapter(tmp_path / "out")
    assert again.scales == pytest.approx(adapter.scales, rel=1e-12)
    other = PeftModel.from_pretrained(hugging_face_llama(), tmp_path / "out").eval()
    assert {n for n, _ in other.named_parameters() if "lora" in n} == {
        n for n, _ in model.named_parameters() if "lora" in n
    }
    ids = random_rows(8)
    torch.testing.assert_close(logits_of(other, ids), logits_of(model, ids), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora: expected False, got True"),
        ({"bias": "all"}, "bias: expected 'none', got 'all'"),
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: expected None"),
        ({"lora_alpha": None}, "lora_alpha: expected a positive number for model.layers.0"),
        ({"r": 5}, "expected rank 5, got A [4, "),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '(' is no pattern"),
    ],
)
def test_configs_that_ask_for_more(tmp_path, changes, message):
    peft_model().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConvertError) as error:
        read_adapter(tmp_path)
    assert message in str(error.value)


def test_every_tensor_is_accounted_for(tmp_path):
    peft_model().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.model."
    tensors[prefix + "embed_tokens.lora_embedding_A"] = torch.zeros(2, 2)
    tensors[prefix + "layers.0.self_attn.x_proj.lora_A.weight"] = torch.zeros(2, 2)
    tensors[prefix + "layers.1.mlp.down_proj.lora_A.weight"][0, 0] = float("inf")
    del tensors[prefix + "layers.2.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(ConvertError) as error:
        read_adapter(tmp_path)
    for part in (
        "lora_embedding_A", "x_proj", "layers.1.mlp.down_proj.lora_A.weight: expected a finite matrix",
        "layers.2.q: lora_A or lora_B is missing",
    ):  # fmt: skip
        assert part in str(error.value)


def test_files_that_are_missing_or_broken(tmp_path):
    with pytest.raises(ConvertError, match="adapter_config.json: cannot be read"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ConvertError, match="expected JSON"):
        read_adapter(tmp_path)
    peft_model().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConvertError, match="not a whole safetensors file"):
        read_adapter(tmp_path)


def test_all_layers_have_a_name_there():
    assert {name for name in LAYER if not name.endswith("norm")} == {"q", "k", "v", "o", "gate", "up", "down"}
