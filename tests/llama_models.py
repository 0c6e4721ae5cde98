"""A LLaMA alone, without the rest of a network, and the same of transformers with random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from small_network import SMALL
from torch import Tensor, nn

from visionllm.convert.llama import fill_llama, llama_config
from visionllm.convert.source import open_source
from visionllm.model.config import ModelConfig
from visionllm.model.llm import LLM, KVCache, base_embedding
from visionllm.model.text_decoding import TextHead


class Llama(nn.Module):
    """Embeddings, LLM and head, named as a `Network` names them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = base_embedding(config)
        self.llm = LLM(config)
        self.text_head = TextHead(config)

    def forward(self, ids: Tensor, adapters: Any = None) -> Tensor:
        """Ids [B, T], padded behind with −1 → logits [B, T, V]."""
        x = self.embedding(ids.clamp(min=0)).float()
        states, _ = self.llm(x, ids >= 0, x.new_zeros(len(x), 0, 1, x.shape[-1]), adapters)
        return self.text_head(states, self.embedding.weight)

    @torch.no_grad()
    def greedy(self, ids: Tensor, count: int, adapters: Tensor | None = None) -> Tensor:
        """Ids as above → the next ones, [B, count], by a cache."""
        cache = KVCache(len(ids), ids.shape[1] + count, ids.device, adapters)
        states = self.llm.read(self.embedding(ids.clamp(min=0)).float(), ids >= 0, cache)
        last = (ids >= 0).sum(1) - 1
        state, written = states[torch.arange(len(ids)), last], []
        there = torch.ones(len(ids), 1, dtype=torch.bool)
        for _ in range(count):
            written.append(self.text_head(state, self.embedding.weight).argmax(-1))
            state = self.llm.read(self.embedding(written[-1][:, None]).float(), there, cache)[:, 0]
        return torch.stack(written, 1)


def hugging_face_llama(seed: int = 0, **changes: Any) -> Any:
    """transformers' LlamaForCausalLM with random weights whose logits are about 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, "rms_norm_eps": 1e-6,
        "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 256,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def llama_of(folder: Path, **changes: Any) -> Llama:
    """What a folder in the layout of Hugging Face holds; changes: of the config."""
    config = dataclasses.replace(SMALL, **{"lora_rank": 0, **llama_config(folder), **changes})
    llama = Llama(config)
    fill_llama(llama, open_source(folder), str(folder))
    return llama.eval()


def padded(*rows: list[int]) -> Tensor:
    """Ids [B, T] with −1 behind shorter ones."""
    ids = torch.full((len(rows), max(map(len, rows))), -1)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids


def random_rows(*lengths: int, vocabulary: int = 97, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return padded(*(torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths))
