"""A BERT's folder with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def bert_folder(folder: Path, words: tuple[str, ...] = (), **changes: Any) -> Any:
    """Writes a small BERT with a vocabulary of letters and words; returns transformers' BertModel."""
    from transformers import BertConfig, BertModel

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?\"'(){}[]<>-_/"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *words]
    sizes = {
        "vocab_size": len(pieces), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = BertModel(BertConfig(**{**sizes, **changes}), add_pooling_layer=False).eval()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return model
