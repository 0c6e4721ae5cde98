"""Every experiment by name, and how its files are written."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from visionllm.reproduce.settings import Settings
from visionllm.reproduce.table import Table, write_overview

PLOT = "plot.png"

EVALUATIONS = ("T1", "T2a", "T2b", "T4e", "fig6", "fig7", "exponent")  # of trained weights
TRAININGS = ("T3b", "T3c", "T4b", "T4a", "T3a", "T4c", "T4d", "unmatched")
EXPERIMENTS = (*EVALUATIONS, *TRAININGS)


def run(experiment: str, settings: Settings) -> Path:
    """Runs an experiment; returns the folder with its table.md, table.json and plot.png.

    Raises:
        ValueError: there is no such experiment, or it cannot be made with these settings.
    """
    if experiment not in EXPERIMENTS:
        raise ValueError(f"experiment: expected one of {', '.join(EXPERIMENTS)}, got {experiment!r}")
    folder = settings.output / experiment
    (train if experiment in TRAININGS else RUNNERS[experiment])(experiment, settings, folder)
    write_overview(settings.output)
    return folder


def train(experiment: str, settings: Settings, folder: Path) -> None:
    """A training experiment; its files are written anew after every run."""
    from visionllm.reproduce.ablations import ABLATIONS
    from visionllm.reproduce.plots import Curves, plot_table
    from visionllm.reproduce.training import run_ablation

    ablation = ABLATIONS[experiment]

    def write(table: Table, curves: Curves) -> None:
        finish(table, experiment, settings, folder)
        plot_table(table, ablation.column, folder / PLOT, curves=curves)

    run_ablation(ablation, settings, write)


def finish(table: Table, experiment: str, settings: Settings, folder: Path) -> None:
    """Writes a table with the command that makes it."""
    command = replace_folders(["visionllm", "reproduce", experiment, *arguments_of(settings)], settings)
    table.commands = [shlex.join(command), *table.commands]
    table.picture = PLOT
    table.write(folder)


def arguments_of(settings: Settings) -> list[str]:
    """The command line's arguments that differ from the defaults, without where files go."""
    usual = Settings(output=settings.output, work=settings.work)
    words: list[str] = []
    for name in (
        "data",
        "glyphs",
        "photos",
        "lvis",
        "model",
        "count",
        "preset",
        "minutes",
        "processes",
        "init",
    ):
        value = getattr(settings, name)
        if value != getattr(usual, name):
            words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    if tuple(settings.seeds) != tuple(usual.seeds):
        words += ["--seeds", *map(str, settings.seeds)]
    return [*words, *settings.overrides]


def replace_folders(words: list[str], settings: Settings) -> list[str]:
    """A command with placeholders for this machine's folders: a committed table names none of them."""
    placeholders = {
        str(path): name
        for path, name in (
            (settings.glyphs, "GLYPHS"),
            (settings.photos, "PHOTOS"),
            (settings.lvis, "LVIS.json"),
        )
        if path is not None
    }
    for weights, name in ((settings.model, "MODEL"), (settings.init or "", "INIT")):
        if "/" in weights:
            placeholders[weights] = name
    return [placeholders.get(word, word) for word in words]


def class_counts(experiment: str, settings: Settings, folder: Path) -> None:
    from visionllm.reproduce.detection import class_counts as evaluate
    from visionllm.reproduce.plots import plot_table

    table = evaluate(settings)
    finish(table, experiment, settings, folder)
    plot_table(table, "AP", folder / PLOT)


def prompts(experiment: str, settings: Settings, folder: Path) -> None:
    from visionllm.reproduce.detection import prompts as evaluate
    from visionllm.reproduce.plots import plot_table

    table = evaluate(settings)
    finish(table, experiment, settings, folder)
    plot_table(table, "AP", folder / PLOT)


def half_of_the_classes(experiment: str, settings: Settings, folder: Path) -> None:
    from visionllm.reproduce.detection import half_of_the_classes as evaluate
    from visionllm.reproduce.plots import plot_classes

    table, by_class = evaluate(settings)
    finish(table, experiment, settings, folder)
    plot_classes(by_class, folder / PLOT)


def score_exponent(experiment: str, settings: Settings, folder: Path) -> None:
    from visionllm.reproduce.detection import score_exponent as evaluate
    from visionllm.reproduce.plots import plot_curve

    table = evaluate(settings)
    finish(table, experiment, settings, folder)
    plot_curve(table, ("AP, training", "AP, never trained on"), folder / PLOT, "exponent a of the objectness")


def all_tasks(experiment: str, settings: Settings, folder: Path) -> None:
    from visionllm.reproduce.plots import plot_table
    from visionllm.reproduce.tasks import all_tasks as evaluate

    table = evaluate(settings)
    finish(table, experiment, settings, folder)
    plot_table(table, "ours", folder / PLOT, paper="paper R50")


def boundary_points(experiment: str, settings: Settings, folder: Path) -> None:
    from visionllm.reproduce.plots import plot_table
    from visionllm.reproduce.tasks import boundary_points as evaluate

    table = evaluate(settings)
    finish(table, experiment, settings, folder)
    plot_table(table, "AP", folder / PLOT)


def large_vocabulary(experiment: str, settings: Settings, folder: Path) -> None:
    from visionllm.reproduce.plots import plot_table
    from visionllm.reproduce.vocabulary import large_vocabulary as evaluate

    table = evaluate(settings)
    finish(table, experiment, settings, folder)
    plot_table(table, "AP", folder / PLOT)


RUNNERS: dict[str, Callable[[str, Settings, Path], None]] = {
    "T1": all_tasks,
    "T2a": class_counts,
    "T2b": boundary_points,
    "T4e": large_vocabulary,
    "fig6": prompts,
    "fig7": half_of_the_classes,
    "exponent": score_exponent,
}
