"""`small` as converted and after training: AP on scenes and photos, beside `tiny-224`, whose detector it has.

    visionllm convert --preset small --output small-base
    python bench/small.py --base small-base --glyphs glyphs --photos DIR [--adapter DIR] [--run DIR]

--photos is a folder with val/ and annotations/instances_val.json in COCO format; --run a training run, whose
validation.csv is the learning curve (without it the last report's stays). Every row is `visionllm evaluate`
on the same pictures. Writes ``bench/results/small.json``.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path

from accuracy import NUMBERS, visionllm
from harness import RESULTS, write_report

LISTED = 20  # names, on scenes


def measure(model: list[str], options: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """AP of a model on both kinds of pictures."""
    annotations = options.photos / "annotations" / "instances_val.json"
    pictures = {
        "scenes": ["--scenes", "val", "--glyphs", str(options.glyphs), "--list-classes", str(LISTED),
                   "--limit", str(options.scenes)],
        "photos": ["--annotations", str(annotations), "--images", str(options.photos / "val"),
                   "--limit", str(options.photo_limit)],
    }  # fmt: skip
    found = {}
    for name, arguments in pictures.items():
        output = work / name
        visionllm("evaluate", *arguments, "--batch-size", "4", "--output", str(output), *model)
        metrics = json.loads((output / "metrics.json").read_text())
        found[name] = {number: metrics[number] for number in NUMBERS if number in metrics}
        if "rejection" in metrics:
            found[name]["rejection"] = metrics["rejection"]
    return found


def curve(run: Path) -> list[dict[str, float]]:
    """The validations of a training run."""
    with (run / "validation.csv").open() as file:
        return [{key: float(row[key]) for key in row if row[key]} for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="what `visionllm convert` wrote")
    parser.add_argument("--adapter", default="small-adapter", help="folder or packaged name")
    parser.add_argument("--glyphs", type=Path, required=True, help="glyph atlas (visionllm glyphs)")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="the training run's folder")
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--photo-limit", type=int, default=60)
    options = parser.parse_args()
    base = ["--model", str(options.base)]
    models = {
        "small, converted": base,
        "small, trained": [*base, "--adapter", str(options.adapter)],
        "tiny-224": ["--model", "tiny-224"],
    }
    rows = []
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as work:
            rows.append({"model": name, **measure(model, options, Path(work))})
        print(name, {kind: round(100 * rows[-1][kind]["AP"], 1) for kind in ("scenes", "photos")}, flush=True)  # type: ignore[index]
    content: dict[str, object] = {
        "scenes": options.scenes,
        "photos": options.photo_limit,
        "names_listed": LISTED,
        "rows": rows,
    }
    report = RESULTS / "small.json"
    if options.run is not None:
        content["curve"] = curve(options.run)
    elif report.is_file():
        content["curve"] = json.loads(report.read_text())["curve"]
    print(f"written to {write_report('small', content)}")


if __name__ == "__main__":
    main()
