"""The experiments as pictures: our numbers beside the paper's, learning curves, per-class bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionllm.evaluate.plots import new_figure, write_figure
from visionllm.reproduce.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, PAPER = "#1f77b4", "#bbbbbb"

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def plot_table(
    table: Table, column: str, path: Path, paper: str | None = None, curves: Curves | None = None
) -> None:
    """A column of a table as bars, the paper's beside it on an axis of its own.

    Args:
        table: the experiment.
        column: of our numbers.
        path: the PNG to write.
        paper: column of the paper's numbers; None: the same.
        curves: training loss by variant, (minutes, losses); drawn beside the bars.
    """
    paper = column if paper is None else paper
    theirs = [row.paper.get(paper) for row in table.rows]
    panels = 1 + any(value is not None for value in theirs) + bool(curves)
    figure = new_figure(1 + 4.2 * panels, 3.2)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    names = [row.name for row in table.rows]
    ours = [row.ours.get(column) for row in table.rows]
    errors = [row.error.get(column, 0.0) for row in table.rows]
    _bars(axes[0], names, ours, OURS, errors)
    axes[0].set_title(f"{table.experiment}, this project", fontsize=10)
    axes[0].set_ylabel(column)
    if any(value is not None for value in theirs):
        _bars(axes[1], names, theirs, PAPER)
        axes[1].set_title("paper", fontsize=10)
        axes[1].set_ylabel(paper)
    if curves:
        for name, (minutes, losses) in curves.items():
            axes[-1].plot(minutes, losses, label=name, linewidth=1.2)
        axes[-1].set(xlabel="minutes", ylabel="training loss", yscale="log")
        axes[-1].grid(alpha=0.3)
        axes[-1].legend(fontsize=7)
    write_figure(figure, path)


def plot_curve(table: Table, columns: Sequence[str], path: Path, xlabel: str) -> None:
    """Columns of a table whose rows are named by a number, as lines over that number."""
    figure = new_figure(5.2, 3.4)
    axes = figure.add_subplot()
    where = [float(row.name) for row in table.rows]
    for column in columns:
        values = [row.ours.get(column) for row in table.rows]
        axes.plot(where, [float("nan") if v is None else v for v in values], marker="o", label=column)
    axes.set(xlabel=xlabel, ylabel="points")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(f"{table.experiment}: {table.title}", fontsize=10)
    write_figure(figure, path)


def plot_classes(found: Mapping[str, Any], path: Path) -> None:
    """Per-class AP of several prompts, one panel each, the classes in the order of the first prompt's AP.

    Args:
        found: ``names``, and ``AP``: by prompt a number or None for every name.
        path: the PNG to write.
    """
    prompts = found["AP"]
    first = next(iter(prompts.values()))
    order = sorted(range(len(first)), key=lambda k: -1.0 if first[k] is None else first[k], reverse=True)
    figure = new_figure(max(6.0, 0.14 * len(order)), 1.8 * len(prompts) + 1.0)
    panels = figure.subplots(len(prompts), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(panels, prompts.items(), strict=True):
        axes.bar(range(len(order)), [values[k] or 0.0 for k in order], color=OURS)
        axes.set_title(f"prompt lists {name}", fontsize=9, loc="left")
        axes.set(ylabel="AP", ylim=(0, 100))
        axes.grid(axis="y", alpha=0.3)
    panels[-1].set_xticks(range(len(order)), [found["names"][k] for k in order], rotation=90, fontsize=6)
    panels[-1].set_xlim(-0.6, len(order) - 0.4)
    write_figure(figure, path)


def _bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float | None],
    colour: str,
    errors: Sequence[float] | None = None,
) -> None:
    heights = [0.0 if value is None else value for value in values]
    shown = errors if errors is not None and any(errors) else None
    drawn = axes.bar(range(len(names)), heights, color=colour, yerr=shown, capsize=3)
    labels = ["–" if value is None else f"{value:.1f}" for value in values]
    axes.bar_label(drawn, labels, fontsize=7, padding=2)
    slanted = max(map(len, names)) > 6
    axes.set_xticks(
        range(len(names)),
        names,
        rotation=30 if slanted else 0,
        ha="right" if slanted else "center",
        fontsize=8,
    )
    axes.set_ylim(0, max([*heights, 1.0]) * 1.15)
    axes.grid(axis="y", alpha=0.3)
