"""Experiments on the boxes of trained weights: T2a, figures 6 and 7, and the score's exponent."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from visionllm.evaluate.coco import CocoEvaluation, evaluate_objects
from visionllm.evaluate.evaluation import COMPARED, ObjectSet, PromptOptions, listed_ground_truth
from visionllm.evaluate.prediction import PicturePrediction, Wanted, coco_results, predict_set
from visionllm.evaluate.prompts import ClassListing
from visionllm.evaluate.rejection import FOUND_SHARE, measure_rejection
from visionllm.evaluate.robustness import robustness_runs
from visionllm.reproduce import paper
from visionllm.reproduce.data import evaluation_set, usual_classes
from visionllm.reproduce.settings import Settings, say
from visionllm.reproduce.table import Row, Table, ordering, seed_means

if TYPE_CHECKING:
    from visionllm.pipeline import VisionLLM

CLASS_COUNTS = (10, 20, 40, 80)
DESCRIPTIONS = 6  # of figure 6, which has two class orders beside them
EXPONENTS = (0.0, 0.15, 0.35, 0.55, 0.7, 0.85, 1.0)
SAME_SPREAD = 1.0  # points that prompts may differ by and still be called alike
NOISE = 0.5  # points that an evaluation of a few hundred pictures may differ by chance

Found = tuple[CocoEvaluation, list[PicturePrediction]]


def load_model(settings: Settings) -> VisionLLM:
    """The weights that the evaluations run on."""
    from visionllm.pipeline import load

    return load(settings.model, settings.device)


def evaluate_classes(
    model: VisionLLM,
    dataset: ObjectSet,
    classes: Sequence[int],
    batch_size: int,
    wanted: Wanted | None = None,
    truth: dict[str, Any] | None = None,
) -> Found:
    """What is found in every picture with these classes listed, and its COCO numbers.

    Args:
        model: the weights.
        dataset: pictures and ground truth.
        classes: positions in the data set's categories, in the order of the prompt.
        batch_size: pictures in one pass.
        wanted: task and wording; None: boxes, in the default wording.
        truth: what to measure against; None: the objects of the listed classes.
    """
    listings = [ClassListing(tuple(classes))] * len(dataset.images)
    wanted = wanted or Wanted()
    predictions = predict_set(model, dataset, dataset.images, listings, wanted, batch_size)
    results = coco_results(predictions, dataset.category_ids)
    against = listed_ground_truth(dataset, listings) if truth is None else truth
    return evaluate_objects(COMPARED[wanted.task], against, results), predictions


def box_numbers(evaluation: CocoEvaluation) -> dict[str, float | None]:
    """The paper's six numbers in points; None where there is nothing to measure."""
    return {
        name: 100 * evaluation.metrics[name] if evaluation.metrics[name] >= 0 else None
        for name in paper.BOX_NUMBERS
    }


def evaluated(settings: Settings, dataset: ObjectSet) -> dict[str, Any]:
    """How an evaluation was made, for the table's last line."""
    return {
        "data": f"{settings.describe_data()}, {len(dataset.images)} pictures never trained on",
        "weights": "packaged tiny" if settings.model == "tiny" else "of a folder",
        "seeds": list(settings.seeds),
    }


def class_counts(settings: Settings) -> Table:
    """T2a: prompts that list 10, 20, 40 or 80 classes, the same objects' AP over the listed classes."""
    model, dataset = load_model(settings), evaluation_set(settings)
    everything = usual_classes(dataset)
    rows = []
    for count in [*(count for count in CLASS_COUNTS if count < len(everything)), len(everything)]:
        numbers = []
        for seed in settings.seeds if count < len(everything) else settings.seeds[:1]:
            say(f"T2a: {count} classes, seed {seed}")
            order = list(everything)
            random.Random(f"classes {seed}").shuffle(order)
            # Nested: the smaller sets are part of the larger ones. In file order, as a user would write them.
            found, _ = evaluate_classes(model, dataset, sorted(order[:count]), settings.batch_size)
            numbers.append(box_numbers(found))
        means, errors = seed_means(numbers)
        rows.append(Row(str(count), means, paper.T2A.get(str(count), {}), errors))
    return Table(
        "T2a",
        "how many classes the prompt lists",
        rows,
        variant="classes",
        verdict=ordering(rows, "AP", NOISE),
        notes=[
            "Mean over the listed classes alone. The paper does not say which classes it lists; here they "
            "are drawn at random for each seed, the smaller sets out of the larger ones."
        ],
        settings=evaluated(settings, dataset),
    )


def prompts(settings: Settings) -> Table:
    """Figure 6: six descriptions and two random class orders, never trained on, and the spread of AP."""
    model, dataset = load_model(settings), evaluation_set(settings)
    classes = usual_classes(dataset)
    first, *_ = settings.seeds
    runs = robustness_runs(PromptOptions(shuffle=first))
    described = [run for run in runs if run[1].template is not None][:DESCRIPTIONS]
    rows = []
    for name, options in [*described, *[run for run in runs if run[1].template is None]]:
        say(f"fig6: {name}")
        listing = ClassListing(classes)
        if options.template is None and options.shuffle is not None:
            listing = listing.shuffled(options.shuffle)
        found, _ = evaluate_classes(model, dataset, listing.indices, settings.batch_size, options.wanted())
        wording = options.template.text if options.template is not None else "default wording, random order"
        rows.append(Row(name, box_numbers(found), note=_shortened(wording)))
    values = [value for row in rows if (value := row.ours["AP"]) is not None]
    spread = max(values) - min(values)
    answer = "holds" if spread <= SAME_SPREAD else "does not hold"
    return Table(
        "fig6",
        "six descriptions and two random class orders",
        rows,
        variant="prompt",
        verdict=f"**The paper's finding {answer}**: AP differs by {spread:.2f} points between the best and "
        f"the worst prompt (paper: {paper.FIG6_SPREAD}; up to {SAME_SPREAD:.0f} counts as alike).",
        notes=[
            "None of these wordings is used in training. Random orders are mapped back to the data set's."
        ],
        settings=evaluated(settings, dataset),
    )


def half_of_the_classes(settings: Settings) -> tuple[Table, dict[str, Any]]:
    """Figure 7: prompts that list 40 of the 80 classes.

    Returns:
        the table, and for the plot ``names`` and the APs of the 80 classes by prompt, None without objects.
    """
    model, dataset = load_model(settings), evaluation_set(settings)
    everything = usual_classes(dataset)
    order = list(everything)
    random.Random(f"half {settings.seeds[0]}").shuffle(order)
    half = len(order) // 2
    asked = {
        f"all {len(order)}": everything,
        "first half": tuple(sorted(order[:half])),
        "second half": tuple(sorted(order[half:])),
    }
    truth = listed_ground_truth(dataset, [ClassListing(everything)] * len(dataset.images))
    objects = {
        image: [entry for entry in entries if entry["category_id"] in _ids(dataset, everything)]
        for image, entries in dataset.objects().items()
    }
    rows, by_prompt = [], {}
    for name, classes in asked.items():
        say(f"fig7: {name}")
        found, predictions = evaluate_classes(model, dataset, classes, settings.batch_size, truth=truth)
        scores = found.class_average_precision()
        by_class = {k: 100 * scores[dataset.category_ids[k]][0] for k in everything}
        by_prompt[name] = [value if (value := by_class[k]) >= 0 else None for k in everything]
        rejection = measure_rejection(predictions, [], objects, dataset.category_ids)
        unlisted = [k for k in everything if k not in classes]
        boxed = rejection.to_dict()["unlisted_boxed_rate"]
        rows.append(
            Row(
                name,
                {
                    "AP of the listed": _mean(by_class, classes),
                    "AP of the others": _mean(by_class, unlisted),
                    "others with a box, %": 100 * boxed if boxed is not None else None,
                },
            )
        )
    # The two halves' listed classes are together the 80: the mean of both beside the prompt with all.
    listed = [row.ours["AP of the listed"] or 0.0 for row in rows]
    others = [row.ours["AP of the others"] or 0.0 for row in rows[1:]]
    change = (listed[1] + listed[2]) / 2 - listed[0]
    answer = "holds" if change > -2 and max(others) < 1 else "does not hold"
    table = Table(
        "fig7",
        "prompts that list 40 of the 80 classes",
        rows,
        variant="prompt",
        verdict=f"**The paper's finding {answer}** (listed classes as with all of them, the others ≈ 0): "
        f"listing half of the classes changes the listed ones' AP by {change:+.1f} points; the others "
        f"have {max(others):.1f} at most.",
        notes=[
            "A class that is not listed has no token, so its AP is 0 by construction. What can go wrong is "
            "its objects being called by a listed name: the last column says how many of them get a box, at "
            f"the score where {100 * FOUND_SHARE:.0f} % of the listed objects are found."
        ],
        settings=evaluated(settings, dataset),
    )
    # Classes without objects have no AP under any prompt.
    shown = [i for i in range(len(everything)) if any(values[i] is not None for values in by_prompt.values())]
    return table, {
        "names": [dataset.names[everything[i]] for i in shown],
        "AP": {name: [values[i] for i in shown] for name, values in by_prompt.items()},
    }


def score_exponent(settings: Settings) -> Table:
    """The exponent a of score = objectness^a · class probability^(1 − a): chosen on training pictures."""
    model = load_model(settings)
    # Other scenes than the runs' own, as in visionllm.train.calibrate; photos are those trained on.
    seen, unseen = evaluation_set(settings, "train", seed=1), evaluation_set(settings)
    sets = {"training": seen, "never trained on": unseen}
    rows = []
    with changed_config(model) as change:
        for exponent in EXPONENTS:
            say(f"exponent: a = {exponent}")
            change(objectness_power=exponent)
            numbers: dict[str, float | None] = {}
            for name, dataset in sets.items():
                found, _ = evaluate_classes(model, dataset, usual_classes(dataset), settings.batch_size)
                numbers[f"AP, {name}"] = box_numbers(found)["AP"]
                numbers[f"AP50, {name}"] = box_numbers(found)["AP50"]
            rows.append(Row(f"{exponent:g}", numbers))
    best = max(rows, key=lambda row: row.ours["AP, training"] or 0.0)
    ends = [row.ours["AP, never trained on"] or 0.0 for row in (rows[0], rows[-1])]
    value = best.ours["AP, never trained on"] or 0.0
    return Table(
        "exponent",
        "the exponent a of a box's score",
        rows,
        variant="a",
        verdict=f"**a = {best.name}** is the best on training pictures: {value:.1f} AP on pictures never "
        f"trained on, {ends[0]:.1f} by the class alone (a = 0), {ends[1]:.1f} by objectness alone (a = 1).",
        notes=[
            "score = objectness^a · (class probability)^(1 − a). The paper does not say how it scores boxes."
        ],
        settings={
            **evaluated(settings, unseen),
            "a of the weights": f"{model.network.config.objectness_power:g}",
        },
    )


class changed_config:
    """Context in which a model's configuration can be changed by keyword; at its end it is as before."""

    def __init__(self, model: VisionLLM) -> None:
        self.network = model.network

    def __enter__(self) -> Callable[..., None]:
        self.before = self.network.config
        return self._change

    def __exit__(self, *_: object) -> None:
        self.network.config = self.before

    def _change(self, **changes: Any) -> None:
        self.network.config = dataclasses.replace(self.before, **changes)


def _ids(dataset: ObjectSet, classes: Sequence[int]) -> set[Any]:
    return {dataset.category_ids[k] for k in classes}


def _mean(by_class: dict[int, float], classes: Sequence[int]) -> float | None:
    known = [by_class[k] for k in classes if by_class[k] >= 0]
    return sum(known) / len(known) if known else None


def _shortened(text: str, most: int = 60) -> str:
    flat = " ".join(text.split()).replace("|", "/")
    return flat if len(flat) <= most else flat[: most - 1] + "…"
