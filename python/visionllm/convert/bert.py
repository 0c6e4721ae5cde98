"""Hugging Face folders of BERT (BERT-Base, MiniLM) into `visionllm.model.bert.Bert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from visionllm.convert.keys import ConvertError, Rule, fill, plan, shapes_of
from visionllm.convert.source import open_source, read_config
from visionllm.model.bert import Bert
from visionllm.words import Words, open_words

_EMBEDDINGS = r"(?:bert\.)?embeddings\."
_LAYER = r"(?:bert\.)?encoder\.layer\.(\d+)\."
# A layer's part here: its name there. Old files call a norm's values gamma and beta.
_LINEARS = {
    "query": r"attention\.self\.query",
    "key": r"attention\.self\.key",
    "value": r"attention\.self\.value",
    "output": r"attention\.output\.dense",
    "ffn_in": r"intermediate\.dense",
    "ffn_out": r"output\.dense",
}
_NORMS = {"attention_norm": r"attention\.output\.LayerNorm", "ffn_norm": r"output\.LayerNorm"}
_AFFINE = {"weight": "weight|gamma", "bias": "bias|beta"}


def bert_rules(target: str = "") -> list[Rule]:
    """Rules of `BertModel` and of the models around it, whose names begin with "bert.".

    Args:
        target: what stands before every name here.
    """
    rules = [
        Rule(_EMBEDDINGS + r"word_embeddings\.weight", f"{target}embedding.weight"),
        Rule(_EMBEDDINGS + r"position_embeddings\.weight", f"{target}position"),
        Rule(_EMBEDDINGS + r"token_type_embeddings\.weight", f"{target}token_type", lambda rows: rows[0]),
    ]
    for here, there in _AFFINE.items():
        rules.append(Rule(_EMBEDDINGS + rf"LayerNorm\.(?:{there})", f"{target}norm.{here}"))
    for part, name in _LINEARS.items():
        rules.append(Rule(_LAYER + name + r"\.(weight|bias)", rf"{target}layers.\1.{part}.\2"))
    for part, name in _NORMS.items():
        for here, there in _AFFINE.items():
            rules.append(Rule(_LAYER + name + rf"\.(?:{there})", rf"{target}layers.\1.{part}.{here}"))
    return [
        *rules,
        Rule(_EMBEDDINGS + "position_ids", None, why="0, 1, 2, …"),
        Rule(r"(?:bert\.)?pooler\.dense\.(?:weight|bias)", None, why="features of every token are read"),
        Rule(r"cls\.(?:predictions|seq_relationship)\..*", None, why="heads of its training"),
    ]


# config.json's key → Bert's argument
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn_dim",
    "max_position_embeddings": "positions",
    "layer_norm_eps": "epsilon",
}
# What Bert does not have a switch for, and what config.json means when it is silent.
FIXED = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}


def bert_sizes(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """`Bert`'s arguments of a BERT's config.json.

    Raises:
        ConvertError: a size is missing, or the model is a variant that `Bert` is not.
    """
    missing = [key for key in SIZES if key not in config]
    if missing:
        raise ConvertError(f"{where}: expected {', '.join(missing)}, got none")
    for key, expected in FIXED.items():
        got = config.get(key)
        if got is not None and got != expected:
            raise ConvertError(f"{where}: {key} must be {expected!r}, got {got!r}")
    return {here: config[there] for there, here in SIZES.items()}


def read_bert(folder: str | Path, allow_pickle: bool = False) -> tuple[Bert, Words]:
    """The model and its vocabulary of a folder in the layout of Hugging Face; fp32, in evaluation mode.

    Args:
        allow_pickle: as for `open_source`.

    Raises:
        ConvertError: the folder's config.json or weights are missing, broken or of another architecture.
        FileNotFoundError, ValueError, ImportError: as `visionllm.words.open_words`.
    """
    folder = Path(folder)
    sizes = bert_sizes(read_config(folder, ("bert",)), str(folder / "config.json"))
    source = open_source(folder, allow_pickle)
    with torch.device("meta"):
        bert = Bert(**sizes)
    steps = plan(source.shapes, shapes_of(bert), bert_rules(), str(folder))
    fill(bert, source, steps, str(folder))
    words = open_words(folder)
    if words.vocab_size > sizes["vocab_size"]:
        raise ConvertError(
            f"{folder}: its vocabulary has {words.vocab_size} ids, its config.json {sizes['vocab_size']}"
        )
    return bert.float().eval(), words
