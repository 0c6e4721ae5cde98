"""The formats of annotations that can be read, by name: for commands and configurations."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionllm.data.report import Report


@dataclass(frozen=True)
class Format:
    """What reads a format. Modules are loaded when they are used.

    Attributes:
        dataset: "module:class"; its first two arguments are the annotation file and the pictures' folder.
        validator: "module:function" of the same two (no folder: None) and ``check_images``; gives a `Report`.
        files: which files it is for.
        tasks: that its pictures can be trained for, in changed views.
        whole_tasks: that need the pictures as they are: what is said of one need not hold for a part
            of it, or its mirror image.
    """

    dataset: str
    validator: str
    files: str
    tasks: tuple[str, ...] = ()
    whole_tasks: tuple[str, ...] = ()

    @property
    def reader(self) -> Any:
        """The data set's class."""
        return _named(self.dataset)

    def open(self, annotations: str | Path, images: str | Path, **options: Any) -> Any:
        """The data set: samples by index. ``options`` and errors are those of its class."""
        return self.reader(annotations, images, **options)

    def validate(self, annotations: str | Path, images: str | Path | None, **options: Any) -> Report:
        """What is wrong with the files. ``options`` and errors are those of the validator."""
        return _named(self.validator)(annotations, images, **options)


def _named(place: str) -> Callable[..., Any]:
    module, name = place.split(":")
    return getattr(importlib.import_module(f"visionllm.data.{module}"), name)


FORMATS: dict[str, Format] = {
    "coco": Format(
        "coco:CocoDataset",
        "validate:validate_coco",
        "COCO's instances and person_keypoints",
        tasks=("detection", "segmentation", "grounding"),
        whole_tasks=("keypoints", "captioning"),
    ),
    "captions": Format(
        "coco_captions:CocoCaptionDataset",
        "coco_captions:validate_captions",
        "COCO's captions",
        whole_tasks=("captioning",),
    ),
    "karpathy": Format(
        "karpathy:KarpathyDataset",
        "karpathy:validate_karpathy",
        "Karpathy's dataset_coco.json",
        whole_tasks=("captioning",),
    ),
    "refcoco": Format(
        "refcoco:RefCocoDataset",
        "refcoco:validate_refcoco",
        "refs of RefCOCO, + and g",
        whole_tasks=("grounding",),
    ),
    "lvis": Format(
        "lvis:LvisDataset", "lvis:validate_lvis", "LVIS v1 and v0.5", tasks=("detection", "segmentation")
    ),
    "llava": Format(
        "llava:LlavaDataset",
        "llava:validate_llava",
        "LLaVA-Instruct's conversations",
        whole_tasks=("captioning", "vqa"),
    ),
}
