"""``visionllm instruction``: shows how a text is understood."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict


def main(argv: Sequence[str]) -> int:
    """Prints the typed form as JSON; returns 1 where the text is no instruction, and shows the place."""
    from visionllm.instruction import InstructionError, parse

    parser = argparse.ArgumentParser(
        prog="visionllm instruction", description="Shows how an instruction is understood, as JSON."
    )
    parser.add_argument("text", metavar="TEXT", help="the instruction; - reads it from standard input")
    text = parser.parse_args(argv).text
    if text == "-":
        text = sys.stdin.read().strip()
    try:
        instruction = parse(text)
    except InstructionError as error:
        start = max(error.position - 60, 0)
        excerpt = " ".join(text[start : error.position + 20].split("\n"))
        print(f"{error}\n  {excerpt}\n  {' ' * (error.position - start)}^", file=sys.stderr)
        return 1
    print(json.dumps(asdict(instruction), ensure_ascii=False, indent=1))
    return 0
