"""``visionllm adapter``: a trained model without what it shares with its base."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from visionllm.cli.arguments import folder


def main(argv: Sequence[str]) -> int:
    """Returns 0; folders that do not fit are an error."""
    parser = argparse.ArgumentParser(
        prog="visionllm adapter",
        description="Writes the tensors in which a trained model differs from the model that its training "
        "started from. `visionllm.load(BASE, adapter=DIR)` puts them together again.",
    )
    parser.add_argument("--base", required=True, metavar="DIR", help="model folder it was trained from")
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder that training wrote")
    parser.add_argument("--output", type=folder, required=True, metavar="DIR", help="adapter folder to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="of the tensors (bfloat16)",
    )
    options = parser.parse_args(argv)
    import torch

    from visionllm.model.adapter_folder import write_adapter

    count, size = write_adapter(
        Path(options.base), Path(options.model), options.output, getattr(torch, options.dtype)
    )
    print(f"{count} tensors, {size / 1e6:.1f} MB, written to {options.output}")
    return 0
