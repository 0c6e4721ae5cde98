"""The pictures that experiments are evaluated on, and the 80 classes that stand for COCO's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionllm.evaluate.dataset import EvaluationSet
from visionllm.evaluate.evaluation import ObjectSet
from visionllm.evaluate.samples import SampleSet
from visionllm.reproduce.settings import Settings

if TYPE_CHECKING:
    from visionllm.data.scenes import SceneDataset

CLASSES = 80  # COCO's number


def evaluation_set(
    settings: Settings, part: str = "val", size: int | None = None, seed: int = 0, **scene_options: Any
) -> ObjectSet:
    """The first ``settings.count`` pictures of a part of the data.

    Args:
        settings: of the command.
        part: "val", or "train" for what may only be chosen on training data.
        size: side of generated scenes in pixels; None: the usual one.
        seed: of generated scenes.
        scene_options: further arguments of SceneDataset, such as ``language=True``.

    Raises:
        ValueError, OSError: the photos' files are missing or wrong; names file and field.
    """
    if settings.data == "coco":
        assert settings.photos is not None
        return EvaluationSet(settings.annotations(part), settings.photos / part, settings.count)
    return SampleSet(scenes(settings, part, size, seed, **scene_options))


def scenes(
    settings: Settings, part: str, size: int | None = None, seed: int = 0, **options: Any
) -> SceneDataset:
    """The generated scenes of ``settings.count`` pictures; options: further arguments of SceneDataset."""
    from visionllm.data.scenes import SceneDataset

    behind = settings.photos is not None
    if size is not None:
        options["size"] = size
    return SceneDataset(
        part,
        seed,
        length=settings.count,
        glyphs=settings.glyphs,
        backgrounds=_train(settings) if behind else None,
        background_annotations=settings.annotations("train") if behind else None,
        **options,
    )


def usual_classes(dataset: ObjectSet, count: int = CLASSES) -> tuple[int, ...]:
    """Positions of the ``count`` classes with the most objects, in file order; ties go to the earlier one."""
    objects = Counter(
        entry["category_id"] for entry in dataset.content["annotations"] if not entry["iscrowd"]
    )
    ranked = sorted(range(len(dataset.names)), key=lambda k: (-objects[dataset.category_ids[k]], k))
    return tuple(sorted(ranked[:count]))


def training_data(settings: Settings) -> dict[str, Any]:
    """The part of a training configuration that says what is trained on."""
    if settings.data == "coco":
        source = {"annotations": str(settings.annotations("train")), "images": _text(_train(settings))}
        return {"scenes": {"weight": 0.0}, "photos": [{**source, "weight": 1.0}]}
    sources: dict[str, Any] = {"weight": 1.0, "glyphs": _text(settings.glyphs)}
    if settings.photos is not None:
        sources["backgrounds"] = _text(_train(settings))
        sources["background_annotations"] = str(settings.annotations("train"))
    return {"scenes": sources, "photos": []}


def _train(settings: Settings) -> Path:
    assert settings.photos is not None
    return settings.photos / "train"


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
