"""Deformable DETR in the layout of transformers (such as SenseTime/deformable-detr), single-stage.

Not used are its class rows (class_embed): objectness here knows no categories, and a maximum over categories
is no row. It keeps its initial value, a probability of 1 %, until it is trained, as the language fusion does.
Both of transformers' spellings are known, `fc1` and `mlp.fc1`, `out_proj` and `o_proj`, and trunks of timm
and of transformers. Box heads may stand in the file several times, once for every layer that shares them or
under "model.decoder." too: copies must be equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visionllm.convert.keys import ConvertError, Rule, Shape, Step, plan
from visionllm.convert.resnet import resnet_rules
from visionllm.convert.source import Source
from visionllm.model.config import STRIDES, ModelConfig
from visionllm.model.resnet import BLOCKS, EXPANSION, STEM_CHANNELS, WIDTHS

MODEL_TYPES = ("deformable_detr",)
# What no published weight fills: it stays as it starts.
STARTS_ANEW = (r"fusion\..*", r"objectness\..*")
CLASSES = "rows of categories: objectness here knows none, and starts at its prior"
SAME = "a copy of another box head"
BOX_HEAD = re.compile(r"(?:model\.)?(?P<place>decoder\.)?bbox_embed\.(?P<layer>\d+)\.layers\.(?P<rest>.*)")


def _rules() -> list[Rule]:
    prefix = r"(?:model\.)?"
    rules = resnet_rules(prefix + r"backbone\.(?:conv_encoder\.)?model\.", "backbone.")
    kind = r"(weight|bias)"

    def same(there: str, here: str) -> None:
        rules.append(Rule(prefix + there, here))

    same(rf"input_proj\.(\d+)\.([01])\.{kind}", r"projections.\1.\2.\3")
    same(r"level_embed", "level")
    same(rf"reference_points\.{kind}", r"reference.\1")
    for part in ("encoder", "decoder"):
        layer, here = rf"{part}\.layers\.(\d+)\.", rf"{part}.\1."
        sampling = "self_attn" if part == "encoder" else "encoder_attn"
        for name in ("sampling_offsets", "attention_weights"):
            same(rf"{layer}{sampling}\.{name}\.{kind}", rf"{here}attention.{name}.\2")
        same(rf"{layer}{sampling}\.value_proj\.{kind}", rf"{here}attention.value.\2")
        same(rf"{layer}{sampling}\.output_proj\.{kind}", rf"{here}attention.output.\2")
        same(rf"{layer}(?:mlp\.)?fc1\.{kind}", rf"{here}ffn.up.\2")
        same(rf"{layer}(?:mlp\.)?fc2\.{kind}", rf"{here}ffn.down.\2")
        same(rf"{layer}final_layer_norm\.{kind}", rf"{here}ffn.norm.\2")
    same(rf"encoder\.layers\.(\d+)\.self_attn_layer_norm\.{kind}", r"encoder.\1.norm.\2")
    layer, here = r"decoder\.layers\.(\d+)\.", r"decoder.\1."
    for there, name in (("q", "query"), ("k", "key"), ("v", "value"), ("(?:o|out)", "output")):
        same(rf"{layer}self_attn\.{there}_proj\.{kind}", rf"{here}{name}.\2")
    same(rf"{layer}self_attn_layer_norm\.{kind}", rf"{here}self_norm.\2")
    same(rf"{layer}encoder_attn_layer_norm\.{kind}", rf"{here}cross_norm.\2")
    rules.append(Rule(prefix + rf"(?:decoder\.)?class_embed\.\d+\.{kind}", None, why=CLASSES))
    return rules


RULES = tuple(_rules())


def _query_rules(queries: int) -> list[Rule]:
    """A query's row is its position, then its content; the first ones are taken."""

    def position(rows: Tensor) -> Tensor:
        return rows[:queries, : rows.shape[1] // 2]

    def content(rows: Tensor) -> Tensor:
        return rows[:queries, rows.shape[1] // 2 :]

    name = r"(?:model\.)?query_position_embeddings\.weight"
    return [Rule(name, "query_position", position), Rule(name, "query_content", content)]


def _box_rules(source: Source, heads: int, where: str) -> list[Rule]:
    """Of the first of every box head's copies; the others must be equal to it."""
    first: dict[str, str] = {}
    rules = []
    names = (match for match in map(BOX_HEAD.fullmatch, source.shapes) if match)
    for match in sorted(names, key=lambda match: (match["place"] is not None, int(match["layer"]))):
        number, _, kind = match["rest"].partition(".")
        head = int(match["layer"]) if heads > 1 else 0
        # Activations stand between the linear layers.
        target = f"box.{head}.{2 * int(number) if number.isdecimal() else number}.{kind}"
        name = match.string
        if target not in first:
            first[target] = name
            rules.append(Rule(re.escape(name), target))
            continue
        one, other = source.read(first[target]), source.read(name)
        if not torch.equal(one, other):
            raise ConvertError(
                f"{where}: expected {name} to be equal to {first[target]}: "
                + ("without box refinement all layers share a head" if heads == 1 else "the same head")
            )
        rules.append(Rule(re.escape(name), None, why=SAME))
    return rules


def deformable_detr_steps(
    source: Source, target: Mapping[str, Shape], where: str, first_queries: bool = False
) -> list[Step]:
    """Of `model.deformable_detr.DeformableDetr`, whose names and shapes are the target.

    Args:
        first_queries: where the source has more queries than the target, take the first of them. Otherwise
            that is an error.

    Raises:
        ConvertError: as `plan`; or copies of one box head differ.
    """
    heads = len({name.split(".")[1] for name in target if name.startswith("box.")})
    queries = target["query_position"][0]
    rows = next((s[0] for name, s in source.shapes.items() if "query_position_emb" in name and s), queries)
    taken = queries if first_queries and rows > queries else rows
    rules = [*RULES, *_query_rules(taken), *_box_rules(source, heads, where)]
    return plan(source.shapes, target, rules, where, STARTS_ANEW)


def check_config(
    values: Mapping[str, Any], config: ModelConfig, where: str, first_queries: bool = False
) -> None:
    """Compares a folder's config.json (`read_config`) with the model that is to take its weights.

    Raises:
        ConvertError: listing every difference that the weights' names and shapes would not all show.
    """
    here = {"detector": "deformable-detr", "backbone": "resnet50"}
    differences = [
        f"{name}: expected {wanted!r} here, got {getattr(config, name)!r}"
        for name, wanted in here.items()
        if getattr(config, name) != wanted
    ]
    needed: dict[str, Any] = {
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), config.heads),
        **dict.fromkeys(("encoder_n_points", "decoder_n_points"), config.points),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), config.ffn_dim),
        "d_model": config.dim,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "num_queries": config.num_queries,
        "with_box_refine": config.box_refine,
        **FIXED,
    }
    for name, wanted in needed.items():
        got = values.get(name, DEFAULTS.get(name))
        if name == "num_queries" and first_queries and isinstance(got, int) and got > wanted:
            continue
        if got != wanted:
            differences.append(f"{name}: expected {wanted!r}, got {got!r}")
    differences += _trunk_differences(values)
    if differences:
        raise ConvertError(f"{where}: " + "; ".join(differences))


# What the architecture here has, and transformers' defaults, which a config.json may leave out.
FIXED: dict[str, Any] = {
    "two_stage": False,
    "position_embedding_type": "sine",
    "activation_function": "relu",
    "num_feature_levels": len(STRIDES),
    "dilation": False,
}
DEFAULTS: dict[str, Any] = {
    **FIXED,
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 8),
    **dict.fromkeys(("encoder_n_points", "decoder_n_points"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 1024),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 6),
    "d_model": 256,
    "num_queries": 300,
    "with_box_refine": False,
}
RESNET50 = {
    "depths": list(BLOCKS),
    "hidden_sizes": [EXPANSION * width for width in WIDTHS],
    "embedding_size": STEM_CHANNELS,
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}


def _trunk_differences(values: Mapping[str, Any]) -> list[str]:
    """Timm's trunk by its name, in the older and newer place; transformers' by its sizes."""
    trunk = values.get("backbone_config")
    if isinstance(trunk, dict) and trunk.get("model_type") == "resnet":
        return [
            f"backbone_config.{name}: expected {wanted!r}, got {trunk[name]!r}"
            for name, wanted in RESNET50.items()
            if name in trunk and trunk[name] != wanted
        ]
    name = trunk.get("backbone") if isinstance(trunk, dict) else values.get("backbone", "resnet50")
    # Timm's names may say which training: "resnet50.a1_in1k".
    if str(name or "resnet50").partition(".")[0] != "resnet50":
        return [f"backbone: expected 'resnet50', got {name!r}"]
    return []


def config_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` that a folder's config.json fixes."""
    get = {**DEFAULTS, **values}.__getitem__
    return {
        "detector": "deformable-detr",
        "backbone": "resnet50",
        "box_refine": get("with_box_refine"),
        "dim": get("d_model"),
        "heads": get("encoder_attention_heads"),
        "points": get("encoder_n_points"),
        "encoder_layers": get("encoder_layers"),
        "decoder_layers": get("decoder_layers"),
        "ffn_dim": get("encoder_ffn_dim"),
        "num_queries": get("num_queries"),
    }
