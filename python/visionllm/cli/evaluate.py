"""``visionllm evaluate``: a model's numbers on files in COCO's format, published sets or generated scenes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionllm.atomic_file import write_json
from visionllm.cli.arguments import add_model_options, folder, load_model, positive
from visionllm.cli.evaluate_language import (
    FORMATS,
    LANGUAGE_TASKS,
    evaluate_language,
    evaluate_written_formats,
)
from visionllm.cli.evaluate_sources import add_sources, described_source, open_samples, source_problem
from visionllm.instruction.instruction import LENGTHS, TASKS

if TYPE_CHECKING:
    from visionllm.evaluate.evaluation import ObjectSet, PromptOptions

PRINTED_CLASSES = 100  # a longer table is cut in the middle; classes.json has all of it


def main(argv: Sequence[str]) -> int:
    """Returns 0; anything wrong with the files is raised as ValueError with the file's name."""
    parser = build_parser()
    options = parser.parse_args(argv)
    problem = source_problem(options) or option_problem(options)
    if problem is not None:
        parser.error(problem)

    if options.task == FORMATS:
        evaluate_written_formats(load_model(options), options)
        return 0

    from visionllm.instruction import EVAL_TEMPLATES

    descriptions = EVAL_TEMPLATES[options.task]
    if options.template is not None and options.template > len(descriptions):
        parser.error(f"--template: expected 1 to {len(descriptions)}, got {options.template}")
    template = None if options.template is None else descriptions[options.template - 1]
    about = {
        "model": str(options.model),
        **({} if options.adapter is None else {"adapter": options.adapter}),
        **described_source(options),
        "template": options.template,
        "seed": options.seed,
    }
    if options.task in LANGUAGE_TASKS:
        samples = open_samples(options)
        evaluate_language(load_model(options), samples, template, options, about)
        return 0
    if options.group_size is not None:
        return evaluate_groups(options, template, about)
    return evaluate_objects(options, template, about)


def evaluate_groups(options: argparse.Namespace, template: Any, about: dict[str, Any]) -> int:
    """Detection among more names than a prompt lists, by LVIS's rules."""
    from tqdm import tqdm

    from visionllm.evaluate.large_vocabulary import evaluate_large_vocabulary

    dataset = open_samples(options)
    model = load_model(options)
    with tqdm(total=len(dataset.images), unit="picture", disable=None) as progress:
        found = evaluate_large_vocabulary(
            model,
            dataset,
            group_size=options.group_size,
            seed=options.shuffle_classes,
            template=template,
            frequency=dataset.frequency,
            batch_size=options.batch_size,
            done=progress.update,
        )
    counts = {"images": len(dataset.images), "categories": len(dataset.names), "groups": len(found.groups)}
    write_json(
        options.output / "metrics.json",
        {**found.metrics, **counts, "group_size": options.group_size, **about},
    )
    write_json(options.output / "predictions.json", found.results, indent=None)
    print_points(found.metrics)
    print(f"{counts['categories']} names in {counts['groups']} groups; written to {options.output}")
    return 0


def evaluate_objects(options: argparse.Namespace, template: Any, about: dict[str, Any]) -> int:
    """Detection, segmentation and keypoints."""
    dataset = open_objects(options)

    from tqdm import tqdm

    from visionllm.evaluate.evaluation import PromptOptions, class_table, evaluate, passes, write_evaluation
    from visionllm.evaluate.keypoints import common_names

    keypoints = options.keypoints
    if options.task == "keypoints":
        keypoints = keypoints or common_names(dataset.content["annotations"])
        about["keypoints"] = list(keypoints)
    sigmas = (options.sigma,) * len(keypoints) if options.sigma is not None else None
    prompts = PromptOptions(
        template,
        options.list_classes,
        options.seed,
        options.shuffle_classes,
        options.task,
        options.points,
        keypoints,
        sigmas,
    )
    about |= {
        "task": options.task,
        "list_classes": options.list_classes,
        "shuffle_classes": options.shuffle_classes,
    }
    model = load_model(options)
    if options.robustness:
        return robustness(model, dataset, prompts, options.batch_size, about, options.output)
    if options.task == "segmentation":
        from visionllm.evaluate.polygon_loss import polygon_loss

        about["points"] = options.points
        about["polygon_loss"] = polygon_loss(dataset.content, [options.points])[0]
    with tqdm(total=passes(dataset, prompts), unit="picture", disable=None) as progress:
        evaluation = evaluate(model, dataset, prompts, options.batch_size, progress.update)
    metrics = write_evaluation(evaluation, dataset, model.threshold, about, options.output)
    print_classes(class_table(dataset, evaluation))
    print_metrics(metrics, evaluation.coco.metrics)
    print(f"written to {options.output}")
    return 0


def open_objects(options: argparse.Namespace) -> ObjectSet:
    """The data set of a task of objects."""
    if options.scenes or options.task == "keypoints" or options.lvis:
        return open_samples(options)
    from visionllm.evaluate.dataset import EvaluationSet

    return EvaluationSet(options.annotations, options.images, options.limit)


def option_problem(options: argparse.Namespace) -> str | None:
    """An option that does not belong to the task."""
    tasks = {
        "keypoints": ("keypoints",),
        "sigma": ("keypoints",),
        "at_once": ("grounding",),
        "list_classes": ("detection", "segmentation", "keypoints"),
        "shuffle_classes": ("detection", "segmentation", "keypoints"),
        "robustness": ("detection", "segmentation", "keypoints"),
        "group_size": ("detection",),
    }
    defaults = {"at_once": 1}
    for name, fitting in tasks.items():
        given = getattr(options, name)
        if given and given != defaults.get(name) and options.task not in fitting:
            return f"--{name.replace('_', '-')} belongs to --task {' or '.join(fitting)}, got {options.task}"
    if options.group_size is not None and (options.list_classes or options.robustness):
        return "--group-size asks for all names: neither --list-classes nor --robustness"
    return None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visionllm evaluate",
        description="Measures a model: boxes (COCO AP), polygons (mask AP), keypoints (OKS AP), referring "
        "expressions (P@0.5), captions (BLEU, CIDEr) or answers (exact match, F1). The category names of the "
        "data are the class set.",
    )
    parser.add_argument(
        "--task",
        choices=[*TASKS, FORMATS],
        default="detection",
        help="what is asked (detection); formats: reserved descriptions of output formats, without pictures",
    )
    add_sources(parser)
    parser.add_argument(
        "--output", type=folder, required=True, metavar="DIR", help="folder for metrics.json and the rest"
    )
    add_model_options(parser)
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="pictures in one pass (8)"
    )
    parser.add_argument(
        "--template", type=positive, metavar="K", help="use evaluation-only description K (from 1 on)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of listed classes (0)")
    classes = parser.add_argument_group("detection, segmentation, keypoints")
    classes.add_argument(
        "--list-classes",
        type=positive,
        metavar="N",
        help="list N classes in each prompt, present and absent ones mixed, and measure rejection as well",
    )
    classes.add_argument(
        "--shuffle-classes",
        type=int,
        metavar="SEED",
        help="list the classes in a random order, not the file's",
    )
    classes.add_argument(
        "--robustness",
        action="store_true",
        help="instead: all evaluation-only descriptions and two random class orders, and the spread of AP",
    )
    forms = parser.add_argument_group("of single tasks")
    forms.add_argument(
        "--group-size",
        type=positive,
        metavar="N",
        help="detection: ask for the names in groups of N, with what these share computed once, and count by "
        "LVIS's rules (the paper: 80)",
    )
    forms.add_argument(
        "--points", type=positive, default=16, metavar="N", help="segmentation: points of a polygon (16)"
    )
    forms.add_argument(
        "--keypoints",
        type=names,
        default=(),
        metavar="NAME,NAME",
        help="keypoints: the points' names (default: those that all objects have)",
    )
    forms.add_argument(
        "--sigma",
        type=float,
        metavar="S",
        help="keypoints: how exactly points are to be met (COCO's for 17 points, else 0.05)",
    )
    forms.add_argument(
        "--at-once", type=positive, default=1, metavar="N", help="grounding: expressions in a prompt (1)"
    )
    forms.add_argument(
        "--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS), help="captioning: which ones (all)"
    )
    forms.add_argument(
        "--beams", type=positive, default=1, metavar="N", help="captioning, vqa: of a beam search (1: none)"
    )
    forms.add_argument(
        "--max-tokens", type=positive, default=128, metavar="N", help="captioning, vqa: longest text (128)"
    )
    return parser


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them, for argparse."""
    found = tuple(name.strip() for name in text.split(","))
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected different names with commas between them, got {text!r}")
    return found


def robustness(
    model: Any,
    dataset: ObjectSet,
    prompts: PromptOptions,
    batch_size: int,
    about: dict[str, Any],
    output: Path,
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


def print_metrics(metrics: dict[str, Any], numbers: dict[str, float]) -> None:
    """The COCO numbers of the task in points, what polygons lose, and the rates of rejection."""
    print()
    print_points(numbers)
    if "boxes" in metrics:
        print("their extents as boxes:")
        print_points(metrics["boxes"])
        loss = metrics["polygon_loss"]
        print(
            f"ground truth as polygons of {loss['points']} points: {percent(loss['area_lost'])} of its area "
            f"lost ({percent(loss['other_parts'])} in other parts), mask AP {points(loss['AP']).strip()}"
        )
    if metrics["malformed"]:
        print(f"answers that could not be read: {metrics['malformed']}")
    found = metrics["rejection"]
    if found is not None:
        print(
            f"score where 80 % of the listed objects are found: {number(found['score'])}\n"
            f"objects of unlisted classes with a box: {percent(found['unlisted_boxed_rate'])} "
            f"of {found['unlisted_objects']}\n"
            f"pictures asked for absent classes only that show a box: {percent(found['absent_shown_rate'])} "
            f"of {found['absent_pictures']}"
        )


def print_points(numbers: dict[str, float]) -> None:
    """Six in a line."""
    entries = [f"{name} {points(value).strip()}" for name, value in numbers.items()]
    for start in range(0, len(entries), 6):
        print("  ".join(entries[start : start + 6]))


def points(value: float) -> str:
    """A fraction in points, 5 wide; a dash where pycocotools says -1."""
    return f"{100 * value:5.1f}" if value >= 0 else "    -"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    return "never" if value is None else f"{value:.3f}"
