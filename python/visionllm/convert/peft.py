"""LoRA adapters as PEFT's folders hold them: adapter_config.json and adapter_model.safetensors, in and out.

base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [R, K], …lora_B.weight [N, R]
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from visionllm.atomic_file import replacing
from visionllm.convert.keys import SHOWN, ConvertError
from visionllm.convert.llama import LAYER
from visionllm.convert.source import open_source
from visionllm.model.lora import Adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HERE = {there: here for here, there in LAYER.items() if not here.endswith("norm")}
KEY = re.compile(
    r"(?:base_model\.model\.)?((?:model\.)?layers\.(\d+)\.([\w.]+?))\.lora_([AB])(?:\.\w+)?\.weight"
)
# Fields that ask for something else than two plain matrices, and what they must be, if they are there.
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None, []),
}


def read_adapter(folder: str | Path, allow_pickle: bool = False) -> Adapter:
    """A PEFT folder's adapter to a LLaMA, for `LLM.add_adapter` or `LLM.set_own_adapter`.

    Args:
        allow_pickle: as for `open_source`.

    Raises:
        ConvertError: a file is missing or broken, the adapter is more than LoRA, or tensors are unknown or
            lack their other half.
    """
    folder = Path(folder)
    where = folder / CONFIG
    try:
        config = json.loads(where.read_bytes())
    except OSError as error:
        raise ConvertError(f"{where}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConvertError(f"{where}: expected JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConvertError(f"{where}: expected a JSON object, got {type(config).__name__}")
    for name, allowed in PLAIN.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ConvertError(f"{where}: {name}: expected {allowed[0]!r}, got {config[name]!r}")
    source = open_source(folder, allow_pickle)
    halves: dict[str, dict[str, Tensor]] = {}
    published: dict[str, str] = {}
    unknown, broken = [], []
    for key in source.shapes:
        match = KEY.fullmatch(key)
        if match is None or match[3] not in HERE:
            unknown.append(key)
            continue
        tensor = source.read(key)
        if not tensor.is_floating_point() or tensor.ndim != 2 or not torch.isfinite(tensor).all():
            broken.append(f"{key}: expected a finite matrix, got {tensor.dtype} {list(tensor.shape)}")
            continue
        name = f"layers.{match[2]}.{HERE[match[3]]}"
        if match[4] in halves.setdefault(name, {}):
            broken.append(f"{key}: {name} has two of these")
        halves[name][match[4]] = tensor.float()
        published[name] = match[1]
    broken += [f"{name}: lora_A or lora_B is missing" for name, pair in halves.items() if len(pair) != 2]
    problems = [f"unused {key}" for key in unknown] + broken
    if problems or not halves:
        shown = "".join(f"\n  {line}" for line in problems[:SHOWN])
        raise ConvertError(f"{folder}: {len(problems)} tensors are no LLaMA's adapter or not whole{shown}")
    layers, scales = {}, {}
    for name, pair in halves.items():
        a, b = pair["A"], pair["B"]
        rank = _of_layer(config, "rank_pattern", "r", published[name], where)
        if not len(a) == b.shape[1] == rank:
            raise ConvertError(
                f"{folder}: {published[name]}: expected rank {rank}, got A {list(a.shape)}, B {list(b.shape)}"
            )
        alpha = _of_layer(config, "alpha_pattern", "lora_alpha", published[name], where)
        layers[name] = (a, b)
        scales[name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Adapter(layers, scales)


def _of_layer(config: dict[str, Any], patterns: str, default: str, layer: str, where: Path) -> float:
    """A number that PEFT may give some layers differently: the first pattern that ends the layer's name."""
    value = config.get(default)
    for pattern, special in (config.get(patterns) or {}).items():
        try:
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", layer):
                value = special
                break
        except re.error as error:
            raise ConvertError(f"{where}: {patterns}: {pattern!r} is no pattern: {error}") from error
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConvertError(f"{where}: {default}: expected a positive number for {layer}, got {value!r}")
    return value


def write_adapter(folder: str | Path, adapter: Adapter, base_model: str = "", dropout: float = 0.0) -> None:
    """Writes a folder that PEFT loads onto a LlamaForCausalLM.

    Args:
        base_model: name or path of the model that it belongs to.
    """
    if not adapter.layers:
        raise ValueError("write_adapter: the adapter has no layers")
    others = [name for name in adapter.layers if not name.startswith("layers.")]
    if others:  # such as an LLM's word layers
        raise ValueError(f"write_adapter: a LLaMA has no layers {', '.join(others[:SHOWN])}")
    tensors, ranks, alphas = {}, {}, {}
    for name, (a, b) in adapter.layers.items():
        _, layer, here = name.split(".")
        published = f"model.layers.{layer}.{LAYER[here]}"
        for half, tensor in (("A", a), ("B", b)):
            key = f"base_model.model.{published}.lora_{half}.weight"
            tensors[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        ranks[published], alphas[published] = len(a), adapter.scales[name] * len(a)
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    targets = sorted(ranks)
    short = sorted({name.rsplit(".", 1)[-1] for name in targets})
    numbers = sorted({int(name.split(".")[2]) for name in targets})
    same = len(targets) == len(short) * len(numbers)  # in all these layers: as PEFT's users write it
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout,
        "target_modules": short if same else targets,
        "layers_to_transform": numbers if same else None,
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): a for name, a in alphas.items() if a != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    folder = Path(folder)
    with replacing(folder / WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    with replacing(folder / CONFIG) as part:
        part.write_text(json.dumps(config, indent=2) + "\n")
