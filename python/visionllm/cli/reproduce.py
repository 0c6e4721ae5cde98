"""``visionllm reproduce``: the paper's experiments, each with its table beside the paper's and a plot."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from visionllm.cli.arguments import folder, positive
from visionllm.reproduce.experiments import EVALUATIONS, EXPERIMENTS, TRAININGS, run
from visionllm.reproduce.settings import DATA, Settings


def main(argv: Sequence[str]) -> int:
    """Returns 0; what is wrong with files, values or a training run is raised and names it."""
    parser = build_parser()
    options = parser.parse_intermixed_args(argv)
    names = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    if not names:
        parser.error(f"expected at least one of {', '.join(EXPERIMENTS)}")
    for name in names:
        if name not in EXPERIMENTS:
            parser.error(f"unknown experiment {name!r}; expected one of {', '.join(EXPERIMENTS)}")
    settings = Settings(
        output=options.output,
        work=options.work,
        data=options.data,
        glyphs=options.glyphs,
        photos=options.photos,
        lvis=options.lvis,
        model=options.model,
        count=options.count,
        batch_size=options.batch_size,
        device=options.device,
        preset=options.preset,
        minutes=options.minutes,
        seeds=tuple(options.seeds),
        processes=options.processes,
        init=options.init,
        overrides=tuple(overrides),
    )
    for name in names:
        written = run(name, settings)
        print((written / "table.md").read_text(encoding="utf-8"))
        print(f"written to {written}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visionllm reproduce",
        description="Runs experiments of the VisionLLM paper and two that it leaves open; writes table.md, "
        "table.json (beside the paper's numbers) and plot.png. "
        f"Of trained weights: {', '.join(EVALUATIONS)}. "
        f"By training variants of a configuration: {', '.join(TRAININGS)}; "
        "interrupted, they go on with the same command.",
        epilog="Example: visionllm reproduce T3b --minutes 10 --seeds 0 1 --output docs/experiments",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="NAME | key=value",
        help=f"experiments: {', '.join(EXPERIMENTS)}; and changes to the training configuration",
    )
    parser.add_argument(
        "--output",
        type=folder,
        default=Path("experiments"),
        metavar="DIR",
        help="a folder for each (experiments)",
    )
    parser.add_argument(
        "--work",
        type=folder,
        default=Path("runs/reproduce"),
        metavar="DIR",
        help="for training runs, kept and shared between experiments (runs/reproduce)",
    )
    parser.add_argument("--data", choices=DATA, default="scenes", help="generated scenes, or photos (scenes)")
    parser.add_argument(
        "--glyphs",
        type=Path,
        metavar="DIR",
        help="glyph atlas (visionllm glyphs); without one: 80 plain shapes",
    )
    parser.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help="train/, val/ and annotations/instances_{train,val}.json; with scenes: what stands behind them",
    )
    parser.add_argument(
        "--lvis", type=Path, metavar="FILE", help="T4e: LVIS annotations, for their 1203 names"
    )
    parser.add_argument("--count", type=positive, default=200, metavar="N", help="pictures evaluated (200)")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="of evaluation (8)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="S", help="of training and of random choices (0)"
    )
    parser.add_argument(
        "--model", default="tiny", metavar="DIR", help="weights to evaluate (default: the packaged tiny)"
    )
    parser.add_argument(
        "--preset", default="ablation", help="training: the configuration that variants change (ablation)"
    )
    parser.add_argument(
        "--minutes", type=minutes, default=5.0, metavar="M", help="training: time of each variant (5)"
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="training: processes; default: the preset's"
    )
    parser.add_argument(
        "--init",
        metavar="DIR",
        help="training: start from these weights (a folder, or tiny) as far as they fit and the experiment "
        "does not compare what they learned; default: the preset's start",
    )
    return parser


def minutes(text: str) -> float:
    """A positive number, for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected minutes above 0, got {text}")
    return value
