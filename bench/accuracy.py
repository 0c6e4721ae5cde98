"""The accuracy table of a model, every task: scenes and a glyph style never trained on, real photos.

    python bench/accuracy.py --glyphs glyphs [--photos DIR] [--model DIR] [--work DIR] [--tasks vqa ...]

--photos is a folder with train/, val/ and annotations/instances_{train,val}.json in COCO format: the training
photos stand behind some of the scenes, the validation photos are measured. Every line is one
`visionllm evaluate` command, which stands beside its numbers in ``bench/results/accuracy.json`` (PHOTOS, WORK
and GLYPHS for the folders). Tasks that the weights were not trained for are left out. --tasks measures some
tasks anew, where the others' numbers cannot have changed, and leaves their rows. Scenes are drawn as large as
the model sees them. Numbers of another model than `tiny` go to ``accuracy_NAME.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import RESULTS, report_of, write_report

from visionllm.data.coco import box_corners
from visionllm.evaluate.matching import IOU_FOUND, box_iou
from visionllm.model.weight_files import rewrite
from visionllm.model_folder import model_folder

PHOTOS, WITHOUT = "photos, all names listed", "photos, without the photo classifier"
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
LANGUAGE = ("grounding", "captioning", "vqa", "formats")
# Of metrics.json, what the command says already.
IN_COMMAND = ("model", "seed", "template", "annotations", "limit", "scenes", "scene_seed", "scene_size")
EXAMPLES = 8  # of captions, answers and expressions, kept with the numbers


def visionllm(*arguments: str) -> str:
    """Runs a command of the package in one thread; returns what a user would type."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "visionllm", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"visionllm {shlex.join(arguments)}\n{done.stderr}")
    return f"visionllm {shlex.join(arguments)}"


def looks(options: argparse.Namespace) -> list[str]:
    """What scenes are made of."""
    chosen = ["--glyphs", str(options.glyphs)]
    if options.photos:
        annotations = options.photos / "annotations" / "instances_train.json"
        chosen += [
            "--backgrounds",
            str(options.photos / "train"),
            "--background-annotations",
            str(annotations),
        ]
    return chosen


def model_config(options: argparse.Namespace) -> dict[str, Any]:
    """The model's config.json."""
    config: dict[str, Any] = json.loads((model_folder(options.model) / "config.json").read_text())
    return config


def without_classifier(options: argparse.Namespace, work: Path) -> Path:
    """A copy of the model in which its photo classifier plays no part."""
    folder = work / "without_classifier"
    shutil.copytree(model_folder(options.model), folder, dirs_exist_ok=True)
    config = {**model_config(options), "classifier_power": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it was edited
        rewrite(folder)
    return folder


def write_scenes(options: argparse.Namespace, work: Path) -> None:
    size = str(model_config(options)["image_size"])
    for split in ("val", "heldout_style"):
        visionllm(
            *("scenes", *looks(options), "--split", split, "--count", str(options.count)),
            *("--size", size, "--output", str(work / split)),
        )


def evaluations(options: argparse.Namespace, work: Path) -> dict[str, list[str]]:
    """Arguments of `visionllm evaluate` by the line of the table."""

    def scenes(split: str, *more: str) -> list[str]:
        return [
            "--annotations",
            str(work / split / "annotations.json"),
            "--images",
            str(work / split / "images"),
            *more,
        ]

    fewer = ["--limit", str(max(1, options.count // 2))]
    table = {
        "scenes, 20 names listed": scenes("val", "--list-classes", "20"),
        "scenes, all names listed": scenes("val", *fewer),
        "unseen glyph style, 20 names listed": scenes("heldout_style", "--list-classes", "20"),
        "8 descriptions, 2 class orders": scenes("val", "--list-classes", "20", "--robustness"),
    }
    if options.photos:
        annotations = options.photos / "annotations" / "instances_val.json"
        table[PHOTOS] = [*("--annotations", str(annotations), "--images", str(options.photos / "val"))]
        if model_config(options).get("classifier_names"):
            table[WITHOUT] = table[PHOTOS]
    return {**table, **other_tasks(options)}


def other_tasks(options: argparse.Namespace) -> dict[str, list[str]]:
    """Those that the weights were trained for, on scenes that are made on the way and on photos."""
    config = model_config(options)
    trained = config.get("tasks", [])
    scenes = ["--scenes", "val", *looks(options), "--limit", str(options.count)]
    scenes += ["--scene-size", str(config["image_size"])]
    some = [*scenes, "--list-classes", "20"]
    lines = {
        "segmentation": {
            f"outlines of {points} points, 20 names listed": [*some, "--points", str(points)]
            for points in (8, 16, 24)
        },
        "keypoints": {"keypoints, 20 names listed": some},
        "grounding": {"expressions": scenes},
        "captioning": {"captions": scenes},
        "vqa": {"questions": scenes},
    }
    if "vqa" in trained or "captioning" in trained:  # formats are taught beside words
        lines["formats"] = {"output formats in words": []}
        trained = [*trained, "formats"]
    if options.photos:
        annotations = options.photos / "annotations" / "instances_val.json"
        photos = ["--annotations", str(annotations), "--images", str(options.photos / "val")]
        lines["segmentation"]["photos, outlines of 16 points, all names listed"] = photos
        lines["grounding"]["photos, expressions made from annotations"] = photos
    return {
        name: ["--task", task, *arguments]
        for task, named in lines.items()
        if task in trained
        for name, arguments in named.items()
    }


def measure(name: str, arguments: list[str], options: argparse.Namespace, work: Path) -> dict[str, object]:
    output = work / "".join(letter if letter.isalnum() else "-" for letter in name)
    model = without_classifier(options, work) if name == WITHOUT else options.model
    command = visionllm("evaluate", *arguments, "--model", str(model), "--output", str(output))
    for folder, placeholder in ((options.photos, "PHOTOS"), (work, "WORK"), (options.glyphs, "GLYPHS")):
        command = command.replace(str(folder), placeholder)
    row: dict[str, object] = {"name": name, "command": command}
    if "--robustness" in arguments:
        found = json.loads((output / "robustness.json").read_text())
        row["AP_spread"] = found["AP_spread"]
        row["runs"] = [{key: run[key] for key in ("name", *NUMBERS)} for run in found["runs"]]
        print(f"{name:<38} spread of AP {found['AP_spread']:.2f}", flush=True)
        return row
    metrics = json.loads((output / "metrics.json").read_text())
    task = metrics["task"]
    row["task"] = task
    if task in LANGUAGE:
        row |= {key: value for key, value in metrics.items() if key not in IN_COMMAND}
        said = json.loads((output / "predictions.json").read_text())
        row["examples"] = said[:: max(1, len(said) // EXAMPLES)][:EXAMPLES]
        print(f"{name:<38} {shown(row)}", flush=True)
        return row
    if name in (PHOTOS, WITHOUT):
        annotations = options.photos / "annotations" / "instances_val.json"
        row["large_objects"] = large_objects(annotations, output / "predictions.json")
    row |= {number: metrics[number] for number in NUMBERS if number in metrics}
    row |= {key: metrics[key] for key in ("rejection", "boxes", "polygon_loss") if key in metrics}
    print(
        f"{name:<38} " + "  ".join(f"{number} {100 * metrics[number]:.1f}" for number in NUMBERS[:3]),
        flush=True,
    )
    return row


def shown(row: dict[str, object]) -> str:
    """The main numbers of expressions, captions or answers."""
    if row["task"] == "captioning":
        lengths = {key: value for key, value in row.items() if isinstance(value, dict)}
        return "  ".join(f"CIDEr {length} {100 * found['CIDEr']:.1f}" for length, found in lengths.items())
    if row["task"] == "formats":
        return f"exact {100 * float(str(row['exact'])):.1f}"
    names = ("P@0.5", "accuracy") if row["task"] == "grounding" else ("exact_match", "f1")
    return "  ".join(f"{name} {100 * float(str(row[name])):.1f}" for name in names)


def large_objects(annotations: Path, predictions: Path, least: float = 0.25) -> dict[str, int]:
    """Photos whose largest object covers at least this share of them: is it found, and called by its name?

    Returns:
        pictures; found: some box has IoU >= 0.5 with it; named: the best-scored of these bears its name.
    """
    truth = json.loads(annotations.read_text())
    boxes = json.loads(predictions.read_text())
    counts = {"pictures": 0, "found": 0, "named": 0}
    for image in truth["images"]:
        objects = [
            entry
            for entry in truth["annotations"]
            if entry["image_id"] == image["id"] and not entry["iscrowd"]
        ]
        largest = max(objects, key=lambda entry: entry["bbox"][2] * entry["bbox"][3], default=None)
        area = image["width"] * image["height"]
        if largest is None or largest["bbox"][2] * largest["bbox"][3] < least * area:
            continue
        counts["pictures"] += 1
        own = [entry for entry in boxes if entry["image_id"] == image["id"]]
        overlaps = box_iou(box_corners(own), box_corners([largest]))[:, 0]
        on_it = [entry for entry, iou in zip(own, overlaps, strict=True) if iou >= IOU_FOUND]
        best = max(on_it, key=lambda entry: entry["score"], default=None)
        counts["found"] += best is not None
        counts["named"] += best is not None and best["category_id"] == largest["category_id"]
    return counts


def task_of(arguments: list[str]) -> str:
    return arguments[arguments.index("--task") + 1] if "--task" in arguments else "detection"


def rows_to_keep(options: argparse.Namespace) -> list[dict]:
    """Those of the last report, where only some are measured anew, each with its commit."""
    if not options.tasks:
        return []
    report = json.loads((RESULTS / f"{report_of('accuracy', options.model)}.json").read_text())
    if report["scenes"] != options.count:
        raise SystemExit(
            f"--tasks: the other rows are of {report['scenes']} scenes, got --count {options.count}"
        )
    return [{"commit": report["commit"], **row} for row in report["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--glyphs", type=Path, required=True, help="glyph atlas (visionllm glyphs)")
    parser.add_argument("--photos", type=Path, help="folder of COCO-format photos, see above")
    parser.add_argument("--model", default="tiny", help="model folder (default: the packaged tiny)")
    parser.add_argument("--count", type=int, default=500, help="scenes of each split")
    parser.add_argument("--jobs", type=int, default=2, help="evaluations at once")
    parser.add_argument(
        "--work", type=Path, help="folder for scenes and predictions (default: a temporary one)"
    )
    parser.add_argument(
        "--tasks", nargs="+", help="only the rows of these tasks; the others stay as they are"
    )
    options = parser.parse_args()
    kept = rows_to_keep(options)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        lines = evaluations(options, work)
        if options.tasks:
            lines = {name: line for name, line in lines.items() if task_of(line) in options.tasks}
        if any(str(work) in argument for line in lines.values() for argument in line):
            write_scenes(options, work)
        with ThreadPoolExecutor(options.jobs) as pool:
            running = {name: pool.submit(measure, name, line, options, work) for name, line in lines.items()}
            found = {name: future.result() for name, future in running.items()}
    rows = [found.pop(row["name"], row) for row in kept] + list(found.values())
    written = write_report(report_of("accuracy", options.model), {"scenes": options.count, "rows": rows})
    print(f"written to {written}")


if __name__ == "__main__":
    main()
