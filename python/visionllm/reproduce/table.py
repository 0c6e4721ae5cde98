"""A table of an experiment beside the paper's, and whether the paper's ordering holds in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from visionllm.atomic_file import replacing, write_json

CLAIMED = 0.25  # points: the paper says nothing about rows that are closer to each other than this


@dataclass
class Row:
    """One line.

    Attributes:
        name: of the variant.
        ours: numbers by column; None where there is none. With several seeds their means.
        paper: the paper's, by column.
        error: standard error of the mean over the seeds, by column, where there are several.
        note: a few words on it.
    """

    name: str
    ours: Mapping[str, float | None]
    paper: Mapping[str, float] = field(default_factory=dict)
    error: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass
class Table:
    """An experiment's result.

    Attributes:
        experiment: "T3b", ...
        title: what is compared.
        rows: the lines.
        variant: heading of the first column.
        verdict: whether the paper's finding holds, in a sentence; see `ordering`.
        notes: paragraphs under the table.
        settings: how it was made: data, budget, seeds, model; strings and numbers.
        commands: what a user would type to get it, or single rows of it.
        picture: file of the plot beside the table.
    """

    experiment: str
    title: str
    rows: list[Row]
    variant: str = "variant"
    verdict: str = ""
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    picture: str = ""

    def columns(self, side: str) -> list[str]:
        """The columns of the rows' numbers, in order; side: "ours" or "paper"."""
        return list(dict.fromkeys(column for row in self.rows for column in getattr(row, side)))

    def markdown(self) -> str:
        """The table, verdict, notes and settings as text."""
        ours, paper = self.columns("ours"), self.columns("paper")
        # A column of the paper's that bears a name of its own ("paper R50") keeps it.
        headings = [name if name.startswith("paper") else f"paper: {name}" for name in paper]
        noted = any(row.note for row in self.rows)
        head = [self.variant, *ours, *headings, *([""] if noted else [])]
        lines = [f"# {self.experiment}: {self.title}", ""]
        if self.verdict:
            lines += [self.verdict, ""]
        lines.append("| " + " | ".join(head) + " |")
        lines.append("|" + "|".join(["---", *["---:"] * (len(ours) + len(paper)), *["---"] * noted]) + "|")
        for row in self.rows:
            cells = [row.name]
            cells += [_cell(row.ours.get(name), row.error.get(name)) for name in ours]
            cells += [_cell(row.paper.get(name), None) for name in paper]
            cells += [row.note] * noted
            lines.append("| " + " | ".join(cells) + " |")
        if self.picture:
            lines += ["", f"![{self.title}]({self.picture})"]
        for note in self.notes:
            lines += ["", note]
        if self.commands:
            lines += ["", "```", *self.commands, "```"]
        if self.settings:
            lines += [
                "",
                "; ".join(f"{key}: {_setting(value)}" for key, value in self.settings.items()) + ".",
            ]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values of everything."""
        return {
            "experiment": self.experiment,
            "title": self.title,
            "verdict": self.verdict,
            "rows": [
                {
                    "name": row.name,
                    "ours": {key: _finite(value) for key, value in row.ours.items()},
                    "error": dict(row.error),
                    "paper": dict(row.paper),
                    "note": row.note,
                }
                for row in self.rows
            ],
            "notes": self.notes,
            "settings": self.settings,
            "commands": self.commands,
        }

    def write(self, folder: Path) -> None:
        """table.md and table.json in a folder, which is made where it is missing."""
        with replacing(folder / "table.md") as part:
            part.write_text(self.markdown(), encoding="utf-8")
        write_json(folder / "table.json", self.to_dict())


def ordering(rows: Sequence[Row], column: str, least: float) -> str:
    """Whether our numbers put the rows in the paper's order: a sentence.

    Every two rows that the paper puts `CLAIMED` points or more apart are compared. Ours decide where they
    differ by more than ``least`` points or, if that is more, by two standard errors of the seeds' means.

    Args:
        rows: of a table.
        column: the number to compare, in both.
        least: points that a single run may differ by chance.
    """
    held: list[str] = []
    broken: list[str] = []
    open_: list[str] = []
    for first, second in combinations(rows, 2):
        if column not in first.paper or column not in second.paper:
            continue
        theirs = first.paper[column] - second.paper[column]
        if abs(theirs) < CLAIMED:
            continue
        a, b = first.ours.get(column), second.ours.get(column)
        pair = f"{first.name} {'>' if theirs > 0 else '<'} {second.name}"
        if a is None or b is None:
            open_.append(pair)
            continue
        noise = 2 * math.hypot(first.error.get(column, 0.0), second.error.get(column, 0.0))
        if abs(a - b) <= max(least, noise):
            open_.append(pair)
        else:
            (held if (a > b) == (theirs > 0) else broken).append(pair)
    total = len(held) + len(broken) + len(open_)
    if not total:
        return ""
    if broken:
        answer = "does not hold" if not held else "holds in part"
    else:
        answer = "holds" if not open_ else "holds as far as it is decided" if held else "is not decided"
    sentence = f"**The paper's ordering by {column} {answer}**: {len(held)} of {total} pairs agree"
    if broken:
        sentence += f"; the other way round: {', '.join(broken)}"
    if open_:
        sentence += f"; too close to tell: {', '.join(open_)}"
    return sentence + "."


def seed_means(
    numbers: Sequence[Mapping[str, float | None]],
) -> tuple[dict[str, float | None], dict[str, float]]:
    """Means over the seeds by column, and their standard errors where there are several seeds.

    A column that a seed lacks has no mean.
    """
    means: dict[str, float | None] = {}
    errors: dict[str, float] = {}
    for column in dict.fromkeys(key for row in numbers for key in row):
        values = [row.get(column) for row in numbers]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            means[column] = None
            continue
        mean = sum(known) / len(known)
        means[column] = mean
        if len(known) > 1:
            variance = sum((value - mean) ** 2 for value in known) / (len(known) - 1)
            errors[column] = math.sqrt(variance / len(known))
    return means, errors


def write_overview(folder: Path) -> None:
    """README.md of a folder of experiments: every table's title, verdict and link."""
    lines = [
        "# Experiments",
        "",
        "Each is one command, `visionllm reproduce NAME`, which stands in its table. T and fig: the tables",
        "and figures of the VisionLLM paper (arXiv:2305.11175); the others: questions that it leaves open.",
        "Those that train do so for the minutes that their table states: they compare what is learned first.",
        "",
    ]
    lines += ["| experiment | what is compared | finding |", "|---|---|---|"]
    for path in sorted(folder.glob("*/table.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        name = content["experiment"]
        lines.append(f"| [{name}]({path.parent.name}/table.md) | {content['title']} | {content['verdict']} |")
    with replacing(folder / "README.md") as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(value: float | None, error: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.1f}" if error is None else f"{value:.1f} ± {error:.1f}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _setting(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
