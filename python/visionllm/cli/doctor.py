"""``visionllm doctor``: versions, instruction set, CUDA and the default model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    argparse.ArgumentParser(
        prog="visionllm doctor", description="Shows versions and what works on this machine."
    ).parse_args(argv)
    from visionllm.doctor import report

    print(report())
    return 0
