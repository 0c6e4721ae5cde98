"""What several commands' arguments have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visionllm.pipeline import VisionLLM


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def score(text: str) -> float:
    """A number in 0..1, for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a score in 0..1, got {text}")
    return value


def folder(text: str) -> Path:
    """A folder to write to, there or not yet, for argparse."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a file, expected a folder")
    return path


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, with what, where: for `load_model`."""
    parser.add_argument(
        "--model", default="tiny", metavar="DIR", help="model folder (default: the packaged tiny)"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="what `visionllm adapter` took out of a model trained from --model"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


def load_model(options: argparse.Namespace) -> VisionLLM:
    """Of `add_model_options`; raises as `visionllm.load`."""
    from visionllm.pipeline import load

    adapter = {} if options.adapter is None else {"adapter": options.adapter}
    return load(options.model, options.device, **adapter)
