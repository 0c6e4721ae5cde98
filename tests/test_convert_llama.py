"""LLaMA folders in the layout of Hugging Face: logits and greedy tokens of transformers' LlamaForCausalLM."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from llama_models import Llama, hugging_face_llama, llama_of, random_rows
from safetensors.torch import load_file
from small_network import SMALL

from visionllm.convert.keys import ConvertError
from visionllm.convert.llama import fill_llama, hugging_face_tensors, llama_config
from visionllm.convert.source import TensorSource, open_source
from visionllm.ops import use_operators

LAYOUTS = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4, "rope_theta": 500.0},
    "one key head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
}
TOLERANCE = 1e-4  # of logits up to 10, in fp32


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def pair(request, tmp_path_factory):
    """transformers' model and its folder, in shards."""
    model = hugging_face_llama(**LAYOUTS[request.param])
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model, folder


@pytest.mark.parametrize("operators", ["kernels", "reference"])
@torch.no_grad()
def test_logits(pair, operators):
    model, folder = pair
    ids = random_rows(17, 5, 11)
    expected = model(ids.clamp(min=0), attention_mask=(ids >= 0).long()).logits
    assert expected.abs().max() > 1
    with use_operators(operators):
        found = llama_of(folder)(ids)
    assert (found - expected)[ids >= 0].abs().max() < TOLERANCE


@torch.no_grad()
def test_logits_with_an_adapter_that_adds_nothing(pair):
    model, folder = pair
    ids = random_rows(9, 4)
    expected = model(ids.clamp(min=0), attention_mask=(ids >= 0).long()).logits
    llama = llama_of(folder, lora_rank=4, lora_targets=("q", "k", "v", "o", "gate", "up", "down"))
    assert (llama(ids) - expected)[ids >= 0].abs().max() < TOLERANCE


@torch.no_grad()
def test_greedy_tokens(pair):
    model, folder = pair
    ids = random_rows(12, 3, 7)
    lengths = (ids >= 0).sum(1).tolist()
    expected = []
    for row, n in zip(ids, lengths, strict=True):
        expected.append(model.generate(row[None, :n], max_new_tokens=20, do_sample=False)[0, n:])
    assert torch.equal(llama_of(folder).greedy(ids, 20), torch.stack(expected))


def test_there_and_back(pair):
    model, folder = pair
    back = hugging_face_tensors(llama_of(folder))
    state = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert back.keys() == state.keys() - tied
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_a_model_on_meta_comes_to_memory(pair):
    _, folder = pair
    expected = llama_of(folder)
    for dtype in ("float32", "bfloat16", "float16", "int8"):
        config = dataclasses.replace(SMALL, **llama_config(folder), base_dtype=dtype)
        with torch.device("meta"):
            llama = Llama(config)
        assert all(p.is_meta for p in llama.parameters())
        fill_llama(llama, open_source(folder), "folder")
        assert not any(p.is_meta for p in llama.parameters())
        assert all(
            p.requires_grad == (dtype == "float32" or "lora" in name) for name, p in llama.named_parameters()
        )
        ids = random_rows(6, 3)
        with torch.no_grad():
            difference = (llama(ids) - expected(ids))[ids >= 0].abs().max()
        assert difference < {"float32": TOLERANCE, "bfloat16": 0.3, "float16": 0.05, "int8": 0.5}[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
@torch.no_grad()
def test_reduced_bases_are_near(pair, dtype):
    """And what is held is what the rounded fp32 weights give in fp32, up to the products' rounding."""
    _, folder = pair
    reduced, exact = llama_of(folder, base_dtype=dtype), llama_of(folder)
    rounded = {name: tensor.float() for name, tensor in hugging_face_tensors(reduced).items()}
    fill_llama(exact, TensorSource(rounded), "rounded")
    ids = random_rows(11, 6)
    difference = (reduced(ids) - exact(ids))[ids >= 0].abs()
    # int8 rows are multiplied in x's type, fp32 here; its embeddings and head are bf16.
    assert difference.mean() < {"bfloat16": 0.03, "float16": 0.004, "int8": 0.02}[dtype]
    weights = [p for name, p in reduced.llm.named_parameters() if p.ndim == 2]
    assert {p.element_size() for p in weights} == {1 if dtype == "int8" else 2}


def test_every_tensor_is_accounted_for(tmp_path):
    hugging_face_llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.7.self_attn.q_proj.weight"] = torch.zeros(64, 64)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.zeros(63)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # of old files
    llama = Llama(dataclasses.replace(SMALL, **llama_config(tmp_path)))
    with pytest.raises(ConvertError) as error:
        fill_llama(llama, TensorSource(tensors), "here")
    for part in (
        "llm.layers.1.up.weight", "layers.7.self_attn.q_proj", "q_proj.bias", "expected shape [64], got [63]",
    ):  # fmt: skip
        assert part in str(error.value)
    assert "inv_freq" not in str(error.value)


def test_values_that_are_not_finite_are_named(tmp_path):
    hugging_face_llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    with pytest.raises(ConvertError, match="model.norm.weight: not finite"):
        fill_llama(Llama(dataclasses.replace(SMALL, **llama_config(tmp_path))), TensorSource(tensors), "x")
    tensors["model.norm.weight"][3] = 1.0
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    config = dataclasses.replace(SMALL, **llama_config(tmp_path), base_dtype="float16")
    with pytest.raises(ConvertError, match="llm.layers.0.up.weight: not finite as torch.float16"):
        fill_llama(Llama(config), TensorSource(tensors), "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "expected \"model_type\" 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"attention_bias": True}, "attention_bias: expected False"),
        ({"head_dim": 20}, "head_dim: expected 16.0, got 20"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope type: expected 'default', got 'llama3'"),
        ({"hidden_size": "64"}, "hidden_size: expected a positive number, got '64'"),
        ({"num_hidden_layers": None}, "num_hidden_layers: expected a positive number, got None"),
    ],
)  # fmt: skip
def test_configs_that_are_no_llama(tmp_path, changes, message):
    hugging_face_llama().config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(ConvertError) as error:
        llama_config(tmp_path)
    assert message in str(error.value)


def test_an_old_config(tmp_path):
    """LLaMA-1's and Alpaca's, as of transformers 4.28."""
    values = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "num_hidden_layers": 32, "rms_norm_eps": 1e-06, "vocab_size": 32001, "hidden_act": "silu",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert llama_config(tmp_path) == {
        "vocab_size": 32001, "llm_dim": 4096, "llm_layers": 32, "llm_heads": 32, "llm_kv_heads": 32,
        "llm_ffn_dim": 11008, "rope_theta": 10000.0, "rms_epsilon": 1e-6, "llm_head": "linear",
    }  # fmt: skip
