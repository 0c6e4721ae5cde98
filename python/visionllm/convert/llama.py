"""LLaMA, Alpaca and their like as Hugging Face publishes them (LlamaForCausalLM), or from a GGUF file.

model.embed_tokens, model.layers.0.{input_layernorm, self_attn.q_proj, …, mlp.down_proj}, model.norm, lm_head
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionllm.convert.keys import ConvertError, Rule, Shape, Step, convert, plan
from visionllm.convert.source import Source, read_config
from visionllm.model.base_linear import quantise_rows
from visionllm.model.llm import DTYPES

# A layer's parts here and there.
LAYER = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
TABLES = "the rotation's table, which is computed"
TIED = "the head reads the embeddings"


def llama_config(folder: str | Path) -> dict[str, Any]:
    """Fields of `ModelConfig` that a folder's config.json gives.

    Raises:
        ConvertError: a field is missing or no number, or asks for what LLaMA's layers here do not have.
    """
    values, where = read_config(folder, ("llama",)), str(Path(folder) / "config.json")

    def number(name: str, default: float | None = None) -> Any:
        value = values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ConvertError(f"{where}: {name}: expected a positive number, got {value!r}")
        return value

    heads, dim = number("num_attention_heads"), number("hidden_size")
    # transformers 5 keeps what concerns the rotation together.
    rope = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    for name, got, expected in (
        ("hidden_act", values.get("hidden_act", "silu"), "silu"),
        ("attention_bias", values.get("attention_bias", False), False),
        ("mlp_bias", values.get("mlp_bias", False), False),
        ("head_dim", values.get("head_dim") or dim / heads, dim / heads),
        ("rope type", kind, "default"),
    ):
        if got != expected:
            raise ConvertError(f"{where}: {name}: expected {expected!r}, got {got!r}")
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    return {
        "vocab_size": number("vocab_size"),
        "llm_dim": dim,
        "llm_layers": number("num_hidden_layers"),
        "llm_heads": heads,
        "llm_kv_heads": number("num_key_value_heads", heads),
        "llm_ffn_dim": number("intermediate_size"),
        "rope_theta": float(number("rope_theta", 10000.0) if theta is None else theta),
        "rms_epsilon": float(number("rms_norm_eps", 1e-6)),
        "llm_head": "tied" if values.get("tie_word_embeddings", False) else "linear",
    }


def llama_rules(head: str) -> list[Rule]:
    """Of a module with `embedding`, `llm` and `text_head`; head: config.llm_head."""
    rules = [
        Rule(r"(?:model\.)?embed_tokens\.weight", "embedding.weight"),
        Rule(r"(?:model\.)?norm\.weight", "llm.norm.weight"),
        Rule(r".*rotary_emb\.inv_freq", None, why=TABLES),
        Rule(r"lm_head\.weight", "text_head.rows")
        if head == "linear"
        else Rule(r"lm_head\.weight", None, why=TIED),
    ]
    for here, there in LAYER.items():
        pattern = r"(?:model\.)?layers\.(\d+)\." + there.replace(".", r"\.") + r"\.weight"
        rules.append(Rule(pattern, rf"llm.layers.\1.{here}.weight"))
    return rules


def llama_target(module: nn.Module) -> dict[str, Shape]:
    """What a LLaMA fills of a module with `embedding`, `llm` and `text_head`: no adapters, no scales."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if name in ("embedding.weight", "text_head.rows")
        or re.fullmatch(r"llm\.(norm|layers\.\d+\.\w+)\.weight", name)
    }


def llama_steps(source: Source, module: nn.Module, where: str) -> list[Step]:
    """Raises ConvertError listing every tensor that is missing, unused or of another shape."""
    target = llama_target(module)
    head: Any = module.text_head
    return plan(source.shapes, target, llama_rules(head.kind), where)


def rows_for(name: str, tensor: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """A weight as a base of this type holds it: with int8 also the scales of its rows."""
    if dtype != torch.int8:
        return {name: tensor.to(dtype)}
    rows, scale = quantise_rows(tensor)
    return {name: rows, name.removesuffix("weight") + "weight_scale": scale}


@torch.no_grad()
def fill_llama(module: nn.Module, source: Source, where: str) -> None:
    """Puts a LLaMA into a module with `embedding`, `llm` and `text_head`, such as a `Network`.

    Tensors are read, cast or quantised, and stored one by one. What is on the device "meta" comes to be in
    memory, adapters as they start: adding nothing.

    Raises:
        ConvertError: as `llama_steps`, or a tensor is not of floating point or not finite, here or there.
    """
    state: Mapping[str, Tensor] = module.state_dict(keep_vars=True)
    for target, tensor in convert(source, llama_steps(source, module, where), where):
        for name, value in rows_for(target, tensor, state[target].dtype).items():
            if value.is_floating_point() and not torch.isfinite(value).all():  # fp16 holds no more than 65504
                raise ConvertError(f"{where}: {name}: not finite as {value.dtype}")
            _put(module, name, state[name], value)
    for name, tensor in state.items():
        if tensor.is_meta and name.startswith("llm.") and name.endswith(("lora_a", "lora_b")):
            start = torch.zeros(tensor.shape, dtype=tensor.dtype)
            if name.endswith("lora_a"):
                nn.init.kaiming_uniform_(start, a=5**0.5)
            _put(module, name, tensor, start)


def _put(module: nn.Module, name: str, old: Tensor, value: Tensor) -> None:
    if not old.is_meta:
        old.copy_(value)
        return
    owner, _, leaf = name.rpartition(".")
    value = value.clone(memory_format=torch.contiguous_format)  # a source's tensor may be a view of a file
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=old.requires_grad))


def hugging_face_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The way back: the module's base as LlamaForCausalLM names it, int8 in fp32. Adapters are left out."""
    state, result = module.state_dict(), {}
    for name in llama_target(module):
        tensor = state[name]
        if tensor.dtype == DTYPES["int8"]:
            tensor = tensor.float() * state[name.removesuffix("weight") + "weight_scale"][:, None]
        result[_published_name(name)] = tensor
    return result


def _published_name(name: str) -> str:
    if name == "embedding.weight":
        return "model.embed_tokens.weight"
    if name == "text_head.rows":
        return "lm_head.weight"
    parts = name.split(".")  # llm.norm.weight, llm.layers.0.q.weight
    if parts[1] == "norm":
        return "model.norm.weight"
    return f"model.layers.{parts[2]}.{LAYER[parts[3]]}.weight"
