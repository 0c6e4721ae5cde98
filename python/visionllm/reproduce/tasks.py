"""Experiments on all tasks of trained weights: T1, and T2b's numbers of boundary points."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from visionllm.evaluate.evaluation import ObjectSet, PromptOptions, evaluate, listed_ground_truth
from visionllm.evaluate.prediction import Wanted
from visionllm.evaluate.prompts import ClassListing
from visionllm.evaluate.samples import SampleSet
from visionllm.reproduce import paper
from visionllm.reproduce.data import evaluation_set, scenes, usual_classes
from visionllm.reproduce.detection import NOISE, box_numbers, evaluate_classes, evaluated, load_model
from visionllm.reproduce.settings import Settings, say
from visionllm.reproduce.table import Row, Table, ordering

if TYPE_CHECKING:
    from visionllm.pipeline import VisionLLM

POINTS = (8, 14, 16, 24)
MOST_POINTS = 24  # of T1's masks

Numbers = dict[str, float | None]


def all_tasks(settings: Settings) -> Table:
    """T1: one set of weights, every task by changing the instruction only."""
    model = load_model(settings)
    measures: dict[str, Callable[[VisionLLM, Settings], Numbers]] = {
        "detection": _detection,
        "segmentation": _segmentation,
        "grounding": _grounding,
        "captioning": _captioning,
        "vqa": _answers,
        "keypoints": _keypoints,
    }
    trained = model.network.config.tasks
    rows: list[Row] = []
    missing = []
    for task, measure in measures.items():
        if task not in trained:
            missing.append(f"{task} (the weights were not trained for it)")
            numbers: Numbers = {}
        else:
            say(f"T1: {task}")
            try:
                numbers = measure(model, settings)
            except NoData as reason:
                missing.append(f"{task} ({reason})")
                numbers = {}
        known = [name for name in paper.T1 if name.startswith(f"{task}, ")]
        for name in dict.fromkeys([*known, *(f"{task}, {key}" for key in numbers)]):
            rows.append(Row(name, {"ours": numbers.get(name.partition(", ")[2])}, paper.T1.get(name, {})))
    notes = [
        "The paper's numbers are of COCO, RefCOCO and the Karpathy split with models a thousand times as "
        "large: they show what is measured.",
        f"Masks of {MOST_POINTS} boundary points. Captions: short ones, greedy decoding.",
    ]
    if missing:
        notes.append(f"Without numbers: {'; '.join(missing)}.")
    dataset = evaluation_set(settings)
    return Table(
        "T1",
        "every task with one set of weights",
        rows,
        variant="task",
        notes=notes,
        settings=evaluated(settings, dataset),
    )


def boundary_points(settings: Settings) -> Table:
    """T2b: masks of 8, 14, 16 or 24 boundary points, as the instruction asks."""
    from visionllm.evaluate.polygon_loss import polygon_loss

    model, dataset = load_model(settings), _with_masks(settings)
    classes = usual_classes(dataset)
    truth = listed_ground_truth(dataset, [ClassListing(classes)] * len(dataset.images))
    say("T2b: what polygons of the true masks lose")
    best = {int(row["points"]): row for row in polygon_loss(truth, POINTS)}
    rows = []
    for points in POINTS:
        say(f"T2b: {points} points")
        wanted = Wanted("segmentation", points=points)
        found, _ = evaluate_classes(model, dataset, classes, settings.batch_size, wanted, truth)
        numbers = box_numbers(found)
        numbers["AP of true polygons"] = 100 * best[points]["AP"]
        rows.append(Row(str(points), numbers, paper.T2B[str(points)]))
    parts = 100 * best[POINTS[0]]["other_parts"]
    return Table(
        "T2b",
        "how many boundary points a mask has",
        rows,
        variant="points",
        verdict=ordering(rows, "AP", NOISE),
        notes=[
            "AP of true polygons: the mask AP of the true masks' own largest parts, resampled to as many "
            f"points. {parts:.1f} % of the objects' area is in other parts."
        ],
        settings=evaluated(settings, dataset),
    )


def grounding_precision(model: VisionLLM, settings: Settings, size: int | None = None) -> float | None:
    """P@0.5 in points, of the expressions that fit something."""
    from visionllm.evaluate.grounding import evaluate_grounding

    found = evaluate_grounding(model, _with_expressions(settings, size), batch_size=settings.batch_size)
    value = found.to_dict()["P@0.5"]
    return None if value is None else 100 * value


class NoData(ValueError):
    """The data have nothing to measure a task with."""


def _detection(model: VisionLLM, settings: Settings) -> Numbers:
    dataset = evaluation_set(settings)
    found, _ = evaluate_classes(model, dataset, usual_classes(dataset), settings.batch_size)
    numbers = box_numbers(found)
    return {name: numbers[name] for name in ("AP", "AP50", "AP75")}


def _segmentation(model: VisionLLM, settings: Settings) -> Numbers:
    dataset = _with_masks(settings)
    wanted = Wanted("segmentation", points=MOST_POINTS)
    found, _ = evaluate_classes(model, dataset, usual_classes(dataset), settings.batch_size, wanted)
    numbers = box_numbers(found)
    return {f"mask {name}": numbers[name] for name in ("AP", "AP50", "AP75")}


def _grounding(model: VisionLLM, settings: Settings) -> Numbers:
    return {"P@0.5": grounding_precision(model, settings)}


def _captioning(model: VisionLLM, settings: Settings) -> Numbers:
    from visionllm.evaluate.captioning import evaluate_captions

    found = evaluate_captions(model, _with_captions(settings), ("short",), batch_size=settings.batch_size)
    numbers = found.to_dict()["short"]
    return {name: 100 * numbers[name] for name in ("BLEU-4", "CIDEr")}


def _answers(model: VisionLLM, settings: Settings) -> Numbers:
    from visionllm.evaluate.answering import evaluate_answers

    if settings.data == "coco":
        raise NoData("the photos have no questions")
    dataset = SampleSet(scenes(settings, "val", language=True))
    numbers = evaluate_answers(model, dataset, batch_size=settings.batch_size).to_dict()
    return {"exact match": 100 * numbers["exact_match"], "token F1": 100 * numbers["f1"]}


def _keypoints(model: VisionLLM, settings: Settings) -> Numbers:
    from visionllm.evaluate.keypoints import common_names

    if settings.data == "coco":
        raise NoData("the photos have no keypoints")
    dataset = SampleSet(scenes(settings, "val", keypoints=True))
    asked = PromptOptions(task="keypoints", keypoints=common_names(dataset.content["annotations"]))
    metrics = evaluate(model, dataset, asked, settings.batch_size).coco.metrics
    return {f"OKS {name}": 100 * metrics[name] for name in ("AP", "AP50", "AP75")}


def _with_masks(settings: Settings) -> ObjectSet:
    return evaluation_set(settings, masks=True)


def _with_expressions(settings: Settings, size: int | None) -> SampleSet:
    """Scenes with their expressions; photos with those made from their annotations."""
    if settings.data == "scenes":
        return SampleSet(scenes(settings, "val", size, language=True))
    from visionllm.cli.evaluate_sources import DerivedExpressions
    from visionllm.data.coco import CocoDataset

    assert settings.photos is not None
    photos = CocoDataset(settings.annotations("val"), settings.photos / "val", check_images="header")
    return SampleSet(DerivedExpressions(photos), settings.count)


def _with_captions(settings: Settings) -> SampleSet:
    if settings.data == "scenes":
        return SampleSet(scenes(settings, "val", language=True))
    from visionllm.data.coco import CocoDataset

    captions = settings.annotations("val").with_name("captions_val.json")
    if not captions.is_file():
        raise NoData(f"the photos have no {captions.name}")
    assert settings.photos is not None
    return SampleSet(
        CocoDataset(
            settings.annotations("val"), settings.photos / "val", check_images="header", captions=captions
        ),
        settings.count,
    )
