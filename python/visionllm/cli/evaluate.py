"""``visionllm evaluate``: a model's numbers on a COCO-format data set."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visionllm.atomic_file import write_json
from visionllm.cli.arguments import folder, positive

PRINTED_CLASSES = 100  # a longer table is cut in the middle; classes.json has all of it


def main(argv: Sequence[str]) -> int:
    """Returns 0; anything wrong with the files is raised as ValueError with the file's name."""
    parser = build_parser()
    options = parser.parse_args(argv)
    output: Path = options.output

    from visionllm.evaluate.dataset import EvaluationSet

    dataset = EvaluationSet(options.annotations, options.images, options.limit)

    from tqdm import tqdm

    from visionllm.evaluate.evaluation import PromptOptions, class_table, evaluate, passes, write_evaluation
    from visionllm.instruction import EVAL_TEMPLATES
    from visionllm.pipeline import load

    descriptions = EVAL_TEMPLATES["detection"]
    if options.template is not None and options.template > len(descriptions):
        parser.error(f"--template: expected 1 to {len(descriptions)}, got {options.template}")
    template = None if options.template is None else descriptions[options.template - 1]
    prompts = PromptOptions(template, options.list_classes, options.seed, options.shuffle_classes)
    model = load(options.model, options.device)
    about = {
        "model": str(options.model),
        "annotations": str(options.annotations),
        "template": options.template,
        "list_classes": options.list_classes,
        "shuffle_classes": options.shuffle_classes,
        "seed": options.seed,
    }
    if options.robustness:
        return robustness(model, dataset, prompts, options.batch_size, about, output)
    with tqdm(total=passes(dataset, prompts), unit="picture", disable=None) as progress:
        evaluation = evaluate(model, dataset, prompts, options.batch_size, progress.update)
    metrics = write_evaluation(evaluation, dataset, model.threshold, about, output)
    print_classes(class_table(dataset, evaluation))
    print_metrics(metrics)
    print(f"written to {output}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visionllm evaluate",
        description="Measures a model on a COCO-format data set; its category names are the class set.",
    )
    parser.add_argument("--annotations", required=True, metavar="FILE", help="COCO annotation file")
    parser.add_argument(
        "--images", required=True, metavar="DIR", help="folder that file names are relative to"
    )
    parser.add_argument(
        "--output", type=folder, required=True, metavar="DIR", help="folder for metrics.json and the rest"
    )
    parser.add_argument(
        "--model", default="tiny", metavar="DIR", help="model folder (default: the packaged tiny)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="pictures in one pass (8)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N pictures")
    parser.add_argument(
        "--list-classes",
        type=positive,
        metavar="N",
        help="list N classes in each prompt, present and absent ones mixed, and measure rejection as well",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of listed classes (0)")
    parser.add_argument(
        "--shuffle-classes",
        type=int,
        metavar="SEED",
        help="list the classes in a random order, not the file's",
    )
    parser.add_argument(
        "--template", type=positive, metavar="K", help="use evaluation-only description K (from 1 on)"
    )
    parser.add_argument(
        "--robustness",
        action="store_true",
        help="instead: all evaluation-only descriptions and two random class orders, and the spread of AP",
    )
    return parser


def robustness(
    model: Any, dataset: Any, prompts: Any, batch_size: int, about: dict[str, Any], output: Path
) -> int:
    """Runs and writes the robustness experiment."""
    from tqdm import tqdm

    from visionllm.evaluate.robustness import evaluate_robustness, robustness_runs

    total = len(robustness_runs(prompts)) * len(dataset.images)
    with tqdm(total=total, unit="picture", disable=None) as progress:
        found = evaluate_robustness(model, dataset, prompts, batch_size, progress.update)
    write_json(output / "robustness.json", {**about, **found})
    for run in found["runs"]:
        print(
            f"{run['name']:<16} AP {points(run['AP'])}  AP50 {points(run['AP50'])}  {run['wording'] or ''}"[
                :110
            ]
        )
    print(f"spread of AP: {found['AP_spread']:.2f} points; written to {output / 'robustness.json'}")
    return 0


def print_classes(table: list[dict[str, Any]]) -> None:
    """The per-class table, the middle of a long one left out."""
    width = max([5, *(len(row["name"]) for row in table)])
    print(f"{'class':<{width}}  objects     AP   AP50")
    shown = table
    if len(table) > PRINTED_CLASSES:
        shown = table[: PRINTED_CLASSES // 2] + table[-PRINTED_CLASSES // 2 :]
    for row in shown:
        print(f"{row['name']:<{width}}  {row['objects']:>7}  {points(row['AP'])}  {points(row['AP50'])}")
    if len(shown) < len(table):
        print(f"({len(table) - len(shown)} classes in the middle are in classes.json)")


def print_metrics(metrics: dict[str, Any]) -> None:
    """The twelve numbers in points, and the rates of rejection."""
    from visionllm.evaluate.coco import METRIC_NAMES

    print()
    for start in (0, 6):
        print(
            "  ".join(f"{name} {points(metrics[name]).strip()}" for name in METRIC_NAMES[start : start + 6])
        )
    found = metrics["rejection"]
    if found is not None:
        print(
            f"score where 80 % of the listed objects are found: {number(found['score'])}\n"
            f"objects of unlisted classes with a box: {percent(found['unlisted_boxed_rate'])} "
            f"of {found['unlisted_objects']}\n"
            f"pictures asked for absent classes only that show a box: {percent(found['absent_shown_rate'])} "
            f"of {found['absent_pictures']}"
        )


def points(value: float) -> str:
    """A fraction in points, 5 wide; a dash where pycocotools says -1."""
    return f"{100 * value:5.1f}" if value >= 0 else "    -"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    return "never" if value is None else f"{value:.3f}"
