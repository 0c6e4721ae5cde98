"""Writes the tables of README.md, of the model cards and of docs/ from bench/results/*.json.

    python bench/tables.py            # rewrites what stands between <!-- name --> and <!-- /name -->
    python bench/tables.py --check    # says which blocks differ from the results, and fails

A number that stands in one of these blocks comes from a committed result and from nowhere else.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
FILES = (
    "README.md",
    "python/visionllm/weights/tiny/README.md",
    "python/visionllm/weights/tiny-224/README.md",
    "docs/performance.md",
    "docs/published_weights.md",
)

EVALUATIONS = {
    "scenes, 20 names listed": "generated scenes never trained on, 469 classes, 20 listed per picture",
    "scenes, all names listed": "half of these scenes, all 469 listed",
    "unseen glyph style, 20 names listed": "the same in a glyph style never trained on, 20 listed",
    "photos, all names listed": "180 COCO photos, 80 names listed; trained on 238",
    "photos, without the photo classifier": "the same photos without the photo classifier",
}
OURS = ("visionllm", "visionllm_fused")
OPERATORS = ("ms_deform_attn", "lora_linear", "fusion_attention", "query_attention", "slot_head")


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def wrap(text: str) -> str:
    return textwrap.fill(text, 150)


def percent(value: float | None) -> str:
    return "–" if value is None or value < 0 else f"{100 * value:.1f}"


def accuracy() -> str:
    found = read("accuracy")
    rows = {row["name"]: row for row in found["rows"]}
    lines = []
    for name, text in EVALUATIONS.items():
        if name not in rows:
            continue
        count = f"{found['scenes']} " if name == "scenes, 20 names listed" else ""
        lines.append([count + text, *(percent(rows[name][key]) for key in ("AP", "AP50", "AP75"))])
    rejection = rows["scenes, 20 names listed"]["rejection"]
    robust = rows["8 descriptions, 2 class orders"]
    averages = [run["AP"] for run in robust["runs"]]
    large = rows["photos, all names listed"]["large_objects"]
    text = (
        "At the score where 80 % of the listed objects are found, "
        f"{percent(rejection['unlisted_boxed_rate'])} % of the objects whose class is not listed get a box, "
        f"and {percent(rejection['absent_shown_rate'])} % of the pictures whose prompt lists absent classes "
        "only show one. Under eight wordings that training never saw and two more class orders, AP is "
        f"{percent(min(averages))} to {percent(max(averages))} (spread "
        f"{robust['AP_spread']:.2f}). Of the {large['pictures']} photos with an object that covers a quarter "
        f"of them, it is found in {large['found']} and called by its name in {large['named']}. Two settings "
        "of the photo classifier were chosen on the same 180 photos (the card of `tiny` says how)."
    )
    header = ["evaluation (`python bench/accuracy.py`)", "AP", "AP50", "AP75"]
    return f"{table(header, lines)}\n\n{wrap(text)}"


def tasks() -> str:
    """One line a task, of the rows of accuracy.json that the weights have."""
    found = read("accuracy")
    lines = []
    for row in found["rows"]:
        task = row.get("task", "detection")
        if task == "segmentation":
            boxes, loss = row["boxes"], row["polygon_loss"]
            text = (
                f"mask AP {percent(row['AP'])} (AP50 {percent(row['AP50'])}), box AP {percent(boxes['AP'])}"
            )
            lines.append([row["name"], f"{text}; the true outlines as polygons: {percent(loss['AP'])}"])
        elif task == "keypoints":
            lines.append([row["name"], f"OKS AP {percent(row['AP'])} (AP50 {percent(row['AP50'])})"])
        elif task == "grounding":
            absent = (
                f"; {row['absent']} of {row['expressions']} fit nothing: {percent(row['absent_found'])} % of "
                f"these are said to be absent, and {percent(row['absent_said_wrongly'])} % of the others"
            )
            text = f"P@0.5 {percent(row['P@0.5'])}"
            lines.append([row["name"], text + (absent if row["absent"] else "")])
        elif task == "captioning":
            lines += [
                [
                    f"{row['name']}, {length}",
                    f"BLEU-4 {percent(row[length]['BLEU-4'])}, CIDEr {percent(row[length]['CIDEr'])}, "
                    f"{row[length]['words']:.1f} words",
                ]
                for length in ("short", "long", "detailed")
                if length in row
            ]
        elif task == "vqa":
            kinds = ", ".join(
                f"{kind.replace('_', '/')} {percent(numbers['exact_match'])}"
                for kind, numbers in row["by_kind"].items()
            )
            lines.append([row["name"], f"exact match {percent(row['exact_match'])} ({kinds})"])
        elif task == "formats":
            text = f"{percent(row['exact'])} % of {row['phrasings']} read as they are meant"
            lines.append([f"{row['name']}, written by the model", text])
    return table(["task (`python bench/accuracy.py`)", "in points"], lines) if lines else ""


def smaller() -> str:
    """tiny-224 beside tiny: the main number of every row of the accuracy reports, and latency."""
    reports = [read(name) for name in ("accuracy", "accuracy_tiny-224")]
    models = [{row["name"]: row for row in report["rows"]} for report in reports]

    def line(text: str, number: Callable[[dict[str, Any]], str]) -> list[str]:
        return [text, *map(number, models)]

    def points(text: str, name: str, key: str) -> list[str]:
        return line(text, lambda rows: percent(rows[name][key]))

    def rejection(text: str, key: str) -> list[str]:
        return line(text, lambda rows: percent(rows["scenes, 20 names listed"]["rejection"][key]))

    def times(count: int) -> str:
        seconds = [
            read(name)[f"predict_seconds_{count}_classes"]["median"]
            for name in ("latency", "latency_tiny-224")
        ]
        return " / ".join(f"{1e3 * one:.0f}" for one in seconds)

    large = [rows["photos, all names listed"]["large_objects"] for rows in models]
    lines = [
        *(points(f"AP: {text}", name, "AP") for name, text in EVALUATIONS.items()),
        rejection("objects not listed that get a box, %", "unlisted_boxed_rate"),
        rejection("prompts for absent classes only that show a box, %", "absent_shown_rate"),
        line(
            "spread of AP over eight wordings and two orders",
            lambda rows: f"{rows['8 descriptions, 2 class orders']['AP_spread']:.2f}",
        ),
        [
            f"large objects of {large[0]['pictures']} photos found / named",
            *(f"{one['found']} / {one['named']}" for one in large),
        ],
        points("mask AP, 16 points", "outlines of 16 points, 20 names listed", "AP"),
        points("keypoints, OKS AP", "keypoints, 20 names listed", "AP"),
        points("expressions, P@0.5", "expressions", "P@0.5"),
        line(
            "captions, CIDEr (short / long / detailed)",
            lambda rows: " / ".join(
                f"{100 * rows['captions'][length]['CIDEr']:.0f}" for length in ("short", "long", "detailed")
            ),
        ),
        points("questions, exact match", "questions", "exact_match"),
        points("output formats in words", "output formats in words", "exact"),
    ]
    text = (
        f"Both are measured on the same {reports[1]['scenes']} scenes, drawn at the size each sees. One "
        f"picture on one core takes (`tiny` / `tiny-224`) {times(10)} ms with 10 names listed, "
        f"{times(80)} ms with 80, {times(320)} ms with 320."
    )
    return (
        f"{table(['in points (`python bench/accuracy.py`)', '`tiny`', '`tiny-224`'], lines)}\n\n{wrap(text)}"
    )


def large_vocabulary() -> str:
    found = read("large_vocabulary")
    lines = [
        [row["name"], f"{1e3 * row['seconds']:.0f}", f"{row['times_as_fast']:.2f}"] for row in found["rows"]
    ]
    header = [f"{found['names']} names in {found['groups']} groups, one picture", "ms", "times as fast"]
    return table(header, lines)


def latency() -> str:
    found = read("latency")
    times = ", ".join(
        f"{1e3 * found[f'predict_seconds_{count}_classes']['median']:.0f} ms with {count} names listed"
        for count in (10, 80, 320)
    )
    machine, other = found["machine"], found["predict_seconds_10_other_classes"]["median"]
    return wrap(
        f"One picture of 640 × 480 pixels on one core of an {machine['cpu']} ({machine['instruction_set']}), "
        f"`python bench/latency.py`: {times}; loading {1e3 * found['load_seconds']:.0f} ms. "
        "The picture is noise, which goes the photos' way through the backbone, and its boxes get closer "
        f"looks; with 10 names that the photo classifier does not know it takes {1e3 * other:.0f} ms."
    )


def operator_rows(name: str) -> list[dict[str, Any]]:
    """Our rows of one operator's CPU results, one thread first: of two forms of ours the fused one."""
    rows: list[dict[str, Any]] = []
    for threads in (1, 2):
        if (RESULTS / f"{name}_{threads}_threads.json").is_file():
            rows += read(f"{name}_{threads}_threads")["rows"]
    ours: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        if row["implementation"] in OURS:
            peers = {peer: ratio for peer, ratio in row["speedup"].items() if peer not in OURS}
            key = row["case"], row["threads"]
            if key not in ours or row["implementation"] == OURS[-1]:
                ours[key] = {**row, "speedup": peers}
    return list(ours.values())


def operator_table(name: str) -> str:
    rows = operator_rows(name)
    peers = list(dict.fromkeys(peer for row in rows for peer in row["speedup"]))
    lines = []
    for row in rows:
        ratios = [f"{row['speedup'][peer]:.2f}" if peer in row["speedup"] else "" for peer in peers]
        lines.append([row["case"], str(row["threads"]), f"{1e3 * row['seconds']:.2f}", *ratios])
    return table(["case", "threads", "ms", *(f"× {peer.replace('_', ' ')}" for peer in peers)], lines)


def operators() -> str:
    """One line an operator: the range of the speed-ups over each peer, one thread."""
    lines = []
    for name in OPERATORS:
        rows = [row for row in operator_rows(name) if row["threads"] == 1]
        peers = list(dict.fromkeys(peer for row in rows for peer in row["speedup"]))
        for peer in peers:
            ratios = [row["speedup"][peer] for row in rows if peer in row["speedup"]]
            text = f"{min(ratios):.1f} – {max(ratios):.1f}"
            lines.append([f"`{name}`", peer.replace("_", " "), str(len(ratios)), text])
    return table(["operator", "beside", "cases", "times as fast"], lines)


def parallel_boxes() -> str:
    lines = []
    for row in read("parallel_boxes")["rows"]:
        after = row["speedup_after_prefix"]
        lines.append(
            [
                f"{row['objects']} objects, {row['type']}",
                str(row["threads"]),
                row["implementation"].replace("_", " "),
                f"{row['seconds']:.3f}",
                f"{row['speedup']:.1f}",
                "" if after is None else f"{after:.1f}",
            ]
        )
    header = ["answer", "threads", "form", "s", "parallel is faster by", "without the prefix"]
    return table(header, lines)


def paper_size() -> str:
    """Weights, seconds and peak memory by part, prediction and training step side by side."""
    if not (RESULTS / "paper_size.json").is_file():
        return "Not measured yet."
    found = read("paper_size")
    rows = {row["case"]: row for row in found["rows"]}
    weights = next(iter(rows.values()))["weights"]
    seconds = {
        case: {(part["part"], part["way"]): part for part in row["parts"]} for case, row in rows.items()
    }
    ways = (("prediction", "forward"), ("training", "forward"), ("training", "backward"))
    parts = list(dict.fromkeys([*weights, "optimizer"]))

    def cell(case: str, part: str, way: str) -> list[str]:
        one = seconds.get(case, {}).get((part, "" if part == "optimizer" else way))
        if one is None or (part == "optimizer" and way == "backward"):
            return ["", ""]
        return [f"{one['seconds']:.1f}", f"{one['peak_bytes'] / 1e9:.1f}"]

    lines = []
    for part in parts:
        size = f"{weights[part]['bytes'] / 1e9:.2f}" if part in weights else ""
        lines.append([part, size, *(text for case, way in ways for text in cell(case, part, way))])
    whole = [f"{sum(size['bytes'] for size in weights.values()) / 1e9:.2f}"]
    for case in ("prediction", "training"):
        row = rows.get(case)
        whole += ["", ""] if row is None else [f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 1e9:.1f}"]
    back = rows.get("training", {}).get("parts", [])
    backward = [part for part in back if part["part"] == "backward"]
    whole += [f"{part['seconds']:.1f}" for part in backward] or [""]
    whole += [f"{part['peak_bytes'] / 1e9:.1f}" for part in backward] or [""]
    lines.append(["**all**", *whole])
    machine, (height, width) = found["machine"], found["picture"]
    text = (
        f"One picture of {height} × {width}, {found['names']} names, {found['llm_layers']} LLM layers in "
        f"{found['base_dtype']}, {found['threads']} threads of an {machine['cpu']} "
        f"({machine['instruction_set']}), the rest in "
        f"{'bfloat16 autocast' if found['autocast'] else 'float32'}. Peaks are of the whole process."
    )
    header = ["part", "weights, GB", "prediction, s", "peak, GB", "training forward, s", "peak, GB"]
    return f"{table([*header, 'backward, s', 'peak, GB'], lines)}\n\n{wrap(text)}"


def small() -> str:
    """AP of `small` as converted and trained beside tiny-224's, and its learning curve."""
    found = read("small")
    numbers = ("AP", "AP50", "AP75")
    lines = [
        [row["model"], *(f"{100 * row[kind][n]:.1f}" for kind in ("scenes", "photos") for n in numbers)]
        for row in found["rows"]
    ]
    scenes, photos = (f"{found[kind]} {kind}" for kind in ("scenes", "photos"))
    text = (
        f"The first {scenes} of the validation split, {found['names_listed']} names listed, and the first "
        f"{photos} of `DATA/val`, all 80 names listed."
    )
    if "curve" in found:
        steps = [
            f"{one['step']:.0f} steps, {one['active_minutes']:.0f} minutes: {one['scenes/AP']:.1f} / "
            f"{one['photos/AP']:.1f}"
            for one in found["curve"]
        ]
        text += f" On the way, AP of few pictures, scenes / photos: {'; '.join(steps)}."
    header = ["model", *(f"{kind}, {n}" for kind in ("scenes", "photos") for n in numbers)]
    return f"{table(header, lines)}\n\n{wrap(text)}"


def binding_cost() -> str:
    lines = [[row["way"], f"{1e6 * row['seconds']:.2f}"] for row in read("binding_cost")["rows"]]
    return table(["a call by", "µs"], lines)


def two_processes() -> str:
    lines = [
        [row["case"].replace("_", " "), str(row["threads"]), f"{row['together']:.2f}"]
        for row in read("two_processes")["rows"]
        if row["processes"] == 2
    ]
    return table(["case", "threads of each", "both, over one alone"], lines)


def behind_torch() -> str:
    kinds = ("one_thread", "in_a_row", "behind_torch")
    lines = [
        [row["case"], *(f"{1e3 * row[kind]:.2f}" for kind in kinds)] for row in read("behind_torch")["rows"]
    ]
    return table(["ms of", "one thread", "two, call after call", "two, behind torch"], lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "smaller": smaller,
    "tasks": tasks,
    "large_vocabulary": large_vocabulary,
    "latency": latency,
    "operators": operators,
    "parallel_boxes": parallel_boxes,
    "binding_cost": binding_cost,
    "two_processes": two_processes,
    "behind_torch": behind_torch,
    "paper_size": paper_size,
    "small": small,
    **{name: lambda name=name: operator_table(name) for name in (*OPERATORS, "model")},  # type: ignore[misc]
}


def filled(text: str) -> str:
    """The text with every block that it has rewritten."""
    for name, render in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if pattern.search(text):
            block = render()
            text = pattern.sub(lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text)  # type: ignore[misc]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a block is out of date"
    )
    options = parser.parse_args()
    stale = []
    for name in FILES:
        text = (ROOT / name).read_text()
        new = filled(text)
        if new != text:
            stale.append(name)
            if not options.check:
                (ROOT / name).write_text(new)
    print(
        "\n".join(f"{name}: {'out of date' if options.check else 'rewritten'}" for name in stale)
        or "up to date"
    )
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
