"""Precision-recall curves and the confusion matrix as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visionllm.atomic_file import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_CLASSES = 40  # rows of a confusion matrix that can still be read


def plot_precision_recall(drawn: dict[str, Any], path: Path) -> None:
    """Mean precision over the classes against recall.

    Args:
        drawn: of `CocoEvaluation.curves`.
        path: the PNG to write.
    """
    figure = new_figure(6.0, 4.5)
    axes = figure.add_subplot()
    for curve in drawn["curves"]:
        axes.plot(drawn["recall"], curve["precision"], label=f"IoU {curve['iou']}: AP {curve['AP']:.3f}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.set_title(f"Precision and recall, mean of {drawn['classes']} classes")
    if drawn["curves"]:
        axes.legend(loc="lower left")
    write_figure(figure, path)


def plot_confusion(matrix: np.ndarray, names: Sequence[str], path: Path) -> None:
    """The confusion matrix, each row as shares of its true class; of many classes the most frequent.

    Args:
        matrix: ``[K + 1, K + 1]`` of `confusion_matrix`.
        names: the K class names.
        path: the PNG to write.
    """
    frequency = matrix[:-1].sum(axis=1)
    shown = np.sort(np.argsort(-frequency, kind="stable")[:SHOWN_CLASSES])
    with_background = np.append(shown, len(names))
    counts = matrix[np.ix_(with_background, with_background)].astype(np.float64)
    totals = matrix[with_background].sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    side = 2.5 + 0.22 * len(with_background)
    figure = new_figure(side + 1, side)
    axes = figure.add_subplot()
    drawn = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    ticks = range(len(with_background))
    labels = [names[index] for index in shown]
    axes.set_xticks(ticks, [*labels, "no box"], rotation=90, fontsize=7)
    axes.set_yticks(ticks, [*labels, "no object"], fontsize=7)
    part = "" if len(shown) == len(names) else f" ({len(shown)} most frequent of {len(names)} classes)"
    axes.set(xlabel="said", ylabel="true")
    axes.set_title(f"Confusion{part}", fontsize=10)
    figure.colorbar(drawn, ax=axes, fraction=0.04, label="share of the true class")
    write_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """A figure that no window system knows of: pyplot and its global state stay out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure whole or not at all; the path's ending says the format."""
    with replacing(path) as part:
        figure.savefig(part, bbox_inches="tight")
