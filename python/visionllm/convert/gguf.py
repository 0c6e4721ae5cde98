"""A LLaMA in a GGUF file, as llama.cpp writes it: its tensors as Hugging Face has them, and its sizes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from visionllm.convert.gguf_file import GGUFFile
from visionllm.convert.keys import ConvertError

# Of llama.cpp's names, and Hugging Face's for the same.
LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFSource:
    """A LLaMA in a GGUF file as Hugging Face names and orders its tensors. Names that LLaMA lacks stay.

    llama.cpp turns neighbouring values of a head against each other, Hugging Face its halves: rows of q and k
    stand in another order.

    Attributes:
        shapes: as of any `Source`. metadata: the file's.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = GGUFFile(path)
        self.metadata, self.where = self.file.metadata, self.file.where
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise ConvertError(f"{path}: general.architecture: expected 'llama', got {architecture!r}")
        self._own_name: dict[str, str] = {}
        for name in self.file.places:
            self._own_name[hugging_face_name(name)] = name
        self.shapes = {name: self.file.places[own].shape for name, own in self._own_name.items()}
        self._heads = {
            "q_proj": metadata_number(self, "attention.head_count"),
            "k_proj": metadata_number(
                self, "attention.head_count_kv", metadata_number(self, "attention.head_count")
            ),
        }
        for name, shape in self.shapes.items():
            heads = self._heads_of(name)
            if heads is not None and (len(shape) != 2 or shape[0] % (2 * heads)):
                raise ConvertError(f"{path}: {name}: expected {heads} heads of even size, got {list(shape)}")

    def _heads_of(self, name: str) -> int | None:
        return self._heads.get(name.removesuffix(".weight").rsplit(".", 1)[-1])

    def read(self, name: str) -> Tensor:
        tensor = self.file.read(self._own_name[name])
        heads = self._heads_of(name)
        if heads is None:
            return tensor
        # [H, D / 2, 2] → [H, 2, D / 2]
        return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def hugging_face_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None or match[2] not in LLAMA_NAMES:
        return name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{LLAMA_NAMES[match[2]]}.weight"


def open_gguf(path: str | Path) -> GGUFSource:
    """Raises ConvertError for what is not a whole GGUF file of a LLaMA."""
    return GGUFSource(path)


def metadata_number(source: GGUFSource, key: str, default: float | None = None) -> Any:
    """A positive number of the architecture's metadata."""
    value = source.metadata.get(f"llama.{key}", default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConvertError(f"{source.where}: llama.{key}: expected a positive number, got {value!r}")
    return value


def gguf_config(source: GGUFSource) -> dict[str, Any]:
    """Fields of `ModelConfig` that the file's metadata gives.

    Raises:
        ConvertError: a field is missing, or asks for what LLaMA's layers here do not have.
    """
    heads = metadata_number(source, "attention.head_count")
    dim = metadata_number(source, "embedding_length")
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if metadata_number(source, key, dim / heads) != dim / heads:
            raise ConvertError(
                f"{source.where}: llama.{key}: expected {dim} / {heads}, got {metadata_number(source, key)}"
            )
    scaling = source.metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ConvertError(f"{source.where}: llama.rope.scaling.type: expected 'none', got {scaling!r}")
    embedding = source.shapes.get("model.embed_tokens.weight")
    if embedding is None or len(embedding) != 2:
        raise ConvertError(f"{source.where}: expected token_embd.weight [V, C], got {embedding}")
    epsilon = np.float32(metadata_number(source, "attention.layer_norm_rms_epsilon"))
    return {
        "vocab_size": embedding[0],
        "llm_dim": dim,
        "llm_layers": metadata_number(source, "block_count"),
        "llm_heads": heads,
        "llm_kv_heads": metadata_number(source, "attention.head_count_kv", heads),
        "llm_ffn_dim": metadata_number(source, "feed_forward_length"),
        "rope_theta": float(metadata_number(source, "rope.freq_base", 10000.0)),
        "rms_epsilon": float(str(epsilon)),  # 1e-05 rather than its fp32 neighbour
        "llm_head": "linear" if "lm_head.weight" in source.shapes else "tied",
    }
