"""Training variants of a configuration for a few minutes each, and what each of them learned.

A variant is a run of ``visionllm train`` with a few keys changed. Runs are kept in the work folder under a
digest of everything that decides them: a command that was interrupted goes on where it stopped, and a variant
that several experiments share is trained once.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import shlex
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from visionllm.atomic_file import replacing, write_json
from visionllm.reproduce.data import training_data
from visionllm.reproduce.plots import Curves
from visionllm.reproduce.settings import Settings, say
from visionllm.reproduce.table import Row, Table, ordering, seed_means
from visionllm.train.config import TrainConfig, load_config

if TYPE_CHECKING:
    from visionllm.pipeline import VisionLLM

NOISE = 1.0  # points that two runs of one configuration may differ by
SMOOTHED = 5  # rows of the log that a point of a loss curve is the mean of

Numbers = dict[str, float | None]
Measure = Callable[["VisionLLM", Settings, TrainConfig], Numbers]


@dataclass(frozen=True)
class Variant:
    """One line of an experiment's table.

    Attributes:
        name: as in the table.
        changes: overrides of the training configuration, ``key=value``; none for the configuration itself.
        paper: the paper's numbers.
        note: a few words for the table.
    """

    name: str
    changes: tuple[str, ...] = ()
    paper: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Ablation:
    """An experiment that trains.

    Attributes:
        experiment: "T3b", ...
        title: what is compared.
        variants: the lines of its table.
        measure: a trained model's numbers.
        column: the number whose order is compared with the paper's.
        common: overrides for all the variants.
        notes: for under the table.
        heading: of the table's first column.
        fresh: patterns of the parameters that start anew even where given weights (``--init``) have them,
            in all variants: what is compared must not have been learned by one of them before.
        verdict: the finding in a sentence, from the rows once all of them have numbers; None: `ordering`.
    """

    experiment: str
    title: str
    variants: tuple[Variant, ...]
    measure: Measure
    column: str = "AP"
    common: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    heading: str = "variant"
    fresh: tuple[str, ...] = ()
    verdict: Callable[[Sequence[Row]], str] | None = None


@dataclass(frozen=True)
class TrainedRun:
    """What is kept of a finished run.

    Attributes:
        folder: its model and log.
        steps: optimiser steps it made; minutes: of training.
        curve: (minutes, losses) of the training loss.
    """

    folder: Path
    steps: int
    minutes: float
    curve: tuple[list[float], list[float]]


def run_ablation(
    ablation: Ablation,
    settings: Settings,
    done: Callable[[Table, Curves], object] = lambda table, curves: None,
) -> Table:
    """Trains and measures every variant with every seed.

    Args:
        ablation: the experiment.
        settings: of the command.
        done: called with the table so far and the loss curves of the first seed after each run.

    Raises:
        KeyboardInterrupt: training was interrupted; the next call goes on.
        RuntimeError: training failed.
        ConfigError: a variant needs a key that the model or the training does not have.
    """
    for variant in ablation.variants:  # before the first of them trains
        check_variant(ablation, variant, settings)
    found: dict[str, list[Numbers]] = {variant.name: [] for variant in ablation.variants}
    runs: dict[str, list[TrainedRun]] = {variant.name: [] for variant in ablation.variants}
    curves: dict[str, tuple[list[float], list[float]]] = {}
    table = _table(ablation, settings, found, runs)
    for seed in settings.seeds:
        for variant in ablation.variants:
            say(f"{ablation.experiment}: {variant.name}, seed {seed}")
            run = train_variant(ablation, variant, settings, seed)
            found[variant.name].append(measure_run(ablation, variant, settings, seed, run))
            runs[variant.name].append(run)
            curves.setdefault(variant.name, run.curve)
            table = _table(ablation, settings, found, runs)
            done(table, curves)
    return table


def training_command(ablation: Ablation, variant: Variant, settings: Settings, seed: int) -> list[str]:
    """The arguments of ``visionllm train`` that decide a run, without its folder and its data."""
    arguments = ["--preset", settings.preset]
    if settings.processes is not None:
        arguments += ["--processes", str(settings.processes)]
    arguments += [f"max_minutes={settings.minutes:g}", f"seed={seed}"]
    return [*arguments, *ablation.common, *settings.overrides, *variant.changes]


def check_variant(ablation: Ablation, variant: Variant, settings: Settings) -> TrainConfig:
    """A variant's configuration. Raises ConfigError where it has a key or value that there is not."""
    from visionllm.train.inputs import check_inputs, model_config

    config = configuration(ablation, variant, settings, settings.seeds[0], settings.work)
    model_config(config)
    if settings.init is None:
        check_inputs(config, resuming=False)
    return config


def configuration(
    ablation: Ablation, variant: Variant, settings: Settings, seed: int, folder: Path
) -> TrainConfig:
    """The configuration of a run with its data file in that folder."""
    data = folder / "data.yaml"
    with replacing(data) as part:
        part.write_text(yaml.safe_dump(training_data(settings)), encoding="utf-8")
    words = training_command(ablation, variant, settings, seed)
    overrides = [word for word in words if "=" in word]
    if settings.processes is not None:
        overrides.append(f"processes={settings.processes}")
    return load_config(settings.preset, data, overrides)


def train_variant(ablation: Ablation, variant: Variant, settings: Settings, seed: int) -> TrainedRun:
    """A variant's run: the one that is there, or the rest of it, or a new one."""
    from visionllm.train.command import main as train

    command = training_command(ablation, variant, settings, seed)
    decides = what_decides(ablation, variant, settings, seed)
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    folder = settings.work / "runs" / digest
    if not (folder / "finished.json").is_file():
        config = configuration(ablation, variant, settings, seed, folder)
        write_json(folder / "decides.json", decides)
        words = [*command, "--config", str(folder / "data.yaml"), "--resume", "auto", f"output={folder}"]
        if settings.init is not None:
            words = with_start(words, config, settings.init, ablation.fresh, folder / "start")
        began = time.monotonic()
        code = train(words)
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise RuntimeError(
                f"{ablation.experiment}, {variant.name}: training ended with {code}: "
                f"visionllm train {shlex.join(words)}"
            )
        write_json(folder / "finished.json", {"seconds": time.monotonic() - began})
        for leftover in ("checkpoints", "start"):  # a quarter of a gigabyte a run
            shutil.rmtree(folder / leftover, ignore_errors=True)
    return read_run(folder)


def what_decides(ablation: Ablation, variant: Variant, settings: Settings, seed: int) -> dict[str, Any]:
    """All that a run's weights depend on but the data's files: its whole configuration, and its start."""
    config = dataclasses.asdict(configuration(ablation, variant, settings, seed, settings.work))
    start = None
    if settings.init is not None:
        from visionllm.pipeline import model_folder

        files = sorted(path for path in model_folder(settings.init).iterdir() if path.is_file())
        start = {
            "files": {path.name: zlib.crc32(path.read_bytes()) for path in files},
            "anew": sorted(ablation.fresh),
        }
    return {"config": config, "start": start}


def with_start(
    words: Sequence[str], config: TrainConfig, init: str, fresh: Sequence[str], folder: Path
) -> list[str]:
    """The command's words for a run that starts from other weights as far as they fit.

    Args:
        words: of ``visionllm train``.
        config: what they say.
        init: model folder or packaged weights. Their sizes are the run's, but for changes under ``model``.
        fresh: patterns of the parameters' names that start anew.
        folder: for the weights that the run starts with.
    """
    from visionllm.model.network import Network, build_network
    from visionllm.pipeline import model_folder

    whole = Network.from_pretrained(model_folder(init))
    changes: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.model.items()
        if key != "keep_pretrained"
    }
    sizes = dataclasses.replace(whole.config, **changes)
    network = build_network(sizes, whole.tokenizer, config.seed)
    own = network.state_dict()
    fitting = {
        name: value
        for name, value in whole.state_dict().items()
        if name in own
        and own[name].shape == value.shape
        and not any(fnmatchcase(name, pattern) for pattern in fresh)
    }
    network.load_state_dict(fitting, strict=False)
    network.known_names = whole.known_names
    say(f"{len(fitting)} of {len(own)} tensors start from {init}")
    network.save_pretrained(folder)
    kept = [word for word in words if not word.startswith(("model.", "init_backbone="))]
    return [*kept, f"init={folder}"]


def read_run(folder: Path) -> TrainedRun:
    """What a finished run left."""
    with open(folder / "train.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    minutes = [float(row["active_minutes"]) for row in rows]
    losses = [float(row["total"]) for row in rows]
    smooth = [sum(part := losses[max(0, i - SMOOTHED + 1) : i + 1]) / len(part) for i in range(len(losses))]
    steps = int(rows[-1]["step"]) if rows else 0
    return TrainedRun(folder, steps, minutes[-1] if minutes else 0.0, (minutes, smooth))


def measure_run(
    ablation: Ablation, variant: Variant, settings: Settings, seed: int, run: TrainedRun
) -> Numbers:
    """The numbers of a run's model; kept beside it for the same pictures and the same experiment."""
    from visionllm.pipeline import load

    kept = run.folder / f"numbers-{ablation.experiment}-{settings.data}-{settings.count}.json"
    if kept.is_file():
        numbers: Numbers = json.loads(kept.read_text(encoding="utf-8"))
        return numbers
    config = configuration(ablation, variant, settings, seed, run.folder)
    numbers = ablation.measure(load(run.folder / "model", settings.device), settings, config)
    write_json(kept, numbers)
    return numbers


def _table(
    ablation: Ablation,
    settings: Settings,
    found: Mapping[str, Sequence[Numbers]],
    runs: Mapping[str, Sequence[TrainedRun]],
) -> Table:
    rows = []
    for variant in ablation.variants:
        means, errors = seed_means(found[variant.name])
        steps = [run.steps for run in runs[variant.name]]
        notes = [variant.note, f"{min(steps)} steps" if steps else ""]
        rows.append(Row(variant.name, means, variant.paper, errors, "; ".join(filter(None, notes))))
    complete = all(row.ours.get(ablation.column) is not None for row in rows)
    if ablation.verdict is None:
        verdict = ordering(rows, ablation.column, NOISE)
    else:
        verdict = ablation.verdict(rows) if complete else ""
    return Table(
        ablation.experiment,
        ablation.title,
        rows,
        variant=ablation.heading,
        verdict=verdict,
        notes=list(ablation.notes),
        settings=describe_training(ablation, settings),
        commands=[
            f"#   {variant.name}: {shlex.join(variant.changes) or '-'}" for variant in ablation.variants
        ],
    )


def describe_training(ablation: Ablation, settings: Settings) -> dict[str, Any]:
    """How the variants were trained, for the table's last line."""
    words: dict[str, Any] = {
        "data": settings.describe_data(),
        "pictures evaluated": settings.count,
        "minutes of training a variant": f"{settings.minutes:g}",
        "seeds": list(settings.seeds),
        "preset": settings.preset,
        "start": "the preset's",
    }
    if settings.init is not None:
        words["start"] = "weights trained before, as far as they fit"
        if ablation.fresh:
            words["anew in all variants"] = list(ablation.fresh)
    return words
