"""T4e: many more names than a prompt lists, asked for in groups, and what that costs in AP and time.

The paper detects LVIS's 1203 classes in 16 groups of at most 80. Here the pictures' own names are filled up
with LVIS's to as many, and the AP of the same 80 classes is compared: alone in one prompt, and among all.
"""

from __future__ import annotations

import time

from visionllm.evaluate.coco import evaluate_objects
from visionllm.evaluate.evaluation import ObjectSet, listed_ground_truth
from visionllm.evaluate.large_vocabulary import grouped_names, predict_in_groups
from visionllm.evaluate.prediction import coco_results
from visionllm.evaluate.prompts import ClassListing
from visionllm.reproduce import paper
from visionllm.reproduce.data import CLASSES, evaluation_set, usual_classes
from visionllm.reproduce.detection import NOISE, box_numbers, evaluate_classes, evaluated, load_model
from visionllm.reproduce.settings import Settings, say
from visionllm.reproduce.table import Row, Table, ordering

NAMES = 1203  # LVIS v1
GROUP = CLASSES  # names in a prompt, at most


def large_vocabulary(settings: Settings) -> Table:
    """The same 80 classes' AP, listed alone and among 1203 names."""
    model, dataset = load_model(settings), evaluation_set(settings)
    classes = usual_classes(dataset)
    names = vocabulary(dataset, settings)
    groups = grouped_names(names, GROUP, settings.seeds[0])
    truth = listed_ground_truth(dataset, [ClassListing(classes)] * len(dataset.images))
    say(f"T4e: {len(classes)} names")
    began = time.perf_counter()
    alone, _ = evaluate_classes(model, dataset, classes, settings.batch_size, truth=truth)
    seconds = [time.perf_counter() - began]
    say(f"T4e: {len(names)} names in {len(groups)} groups")
    began = time.perf_counter()
    predictions = predict_in_groups(model, dataset, groups, batch_size=settings.batch_size)
    seconds.append(time.perf_counter() - began)
    among = evaluate_objects("boxes", truth, coco_results(predictions, dataset.category_ids))
    per_picture = [1000 * value / len(dataset.images) for value in seconds]
    rows = [
        Row(
            str(count),
            {**box_numbers(found), "ms a picture": milliseconds},
            paper_row,
            note=f"{group_count} prompt{'s' * (group_count > 1)}",
        )
        for count, found, milliseconds, paper_row, group_count in (
            (len(classes), alone, per_picture[0], paper.T4E["80"], 1),
            (len(names), among, per_picture[1], paper.T4E["1203"], len(groups)),
        )
    ]
    return Table(
        "T4e",
        "a large vocabulary in groups",
        rows,
        variant="names",
        verdict=ordering(rows, "AP", NOISE),
        notes=[
            f"AP of the same {len(classes)} classes in both rows; the paper's rows are of COCO and of LVIS. "
            "The best 300 boxes of all groups are kept, whichever of the names they bear; a name is weighed "
            'against "no object" alone. What the groups share is computed once for a picture.',
            f"Names: {len(dataset.names)} of the pictures' own kind"
            + (
                f", {len(names) - len(dataset.names)} more of LVIS."
                if len(names) > len(dataset.names)
                else "."
            ),
        ],
        settings=evaluated(settings, dataset),
    )


def vocabulary(dataset: ObjectSet, settings: Settings) -> list[str]:
    """The data set's names, and LVIS's behind them up to `NAMES` where ``settings.lvis`` gives them.

    Raises:
        DatasetError, OSError: the LVIS file cannot be used.
    """
    names = list(dataset.names)
    if settings.lvis is None:
        return names
    from visionllm.data.lvis import read_lvis_json

    known = {name.lower() for name in names}
    for category in read_lvis_json(settings.lvis, None)["categories"]:
        if len(names) < NAMES and category["name"].lower() not in known:
            known.add(category["name"].lower())
            names.append(category["name"])
    return names
