"""SmolLM2-135M-Instruct, from its GGUF file: logits and greedy tokens of transformers with real weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gguf_files import smollm2
from llama_models import Llama, padded
from small_network import SMALL

from visionllm.convert.gguf import gguf_config, open_gguf
from visionllm.convert.llama import fill_llama

PROMPTS = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, a cat and a dog",
)


@pytest.fixture(scope="module")
def there():
    """transformers' model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2()
    load = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **load).eval()
    return model, AutoTokenizer.from_pretrained(path.parent, **load)


@pytest.fixture(scope="module")
def here():
    source = open_gguf(smollm2())
    llama = Llama(dataclasses.replace(SMALL, **gguf_config(source), lora_rank=0)).eval()
    fill_llama(llama, source, "SmolLM2")
    return llama


@torch.no_grad()
def test_logits_and_greedy_tokens(there, here):
    model, tokenizer = there
    rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    ids, count = padded(*rows), 24
    found, written = here(ids), here.greedy(ids, count)
    for b, row in enumerate(rows):
        alone = torch.tensor([row])
        expected = model(alone).logits[0]
        assert (found[b, : len(row)] - expected).abs().max() < 1e-3
        said = model.generate(
            alone,
            attention_mask=torch.ones_like(alone),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=-1,
        )
        assert written[b].tolist() == said[0, len(row) :].tolist()
    assert "Paris" in tokenizer.decode(written[0])


def test_config(here):
    assert gguf_config(open_gguf(smollm2())) == {
        "vocab_size": 49152, "llm_dim": 576, "llm_layers": 30, "llm_heads": 9, "llm_kv_heads": 3,
        "llm_ffn_dim": 1536, "rope_theta": 100000.0, "rms_epsilon": 1e-5, "llm_head": "tied",
    }  # fmt: skip
