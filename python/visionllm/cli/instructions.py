"""``visionllm instructions multiply``: more wordings of the instructions, by a language model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from visionllm.cli.arguments import positive


def main(argv: Sequence[str]) -> int:
    """Returns 0 when every task got as many wordings as asked for, 1 when fewer."""
    from visionllm.instruction.instruction import TASKS

    parser = argparse.ArgumentParser(
        prog="visionllm instructions", description="Wordings of the instructions to train on."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    multiplying = commands.add_parser(
        "multiply",
        help="have a language model write more wordings",
        description="Has a language model say the seed instructions in other words, through any endpoint "
        "with the chat-completions protocol. Taken are wordings with the seed's placeholders that are "
        "understood as the same instruction and are new.",
    )
    multiplying.add_argument(
        "--endpoint", required=True, metavar="URL", help="its base, such as http://localhost:8000/v1"
    )
    multiplying.add_argument("--model", required=True, metavar="NAME", help="the model's name there")
    multiplying.add_argument("--output", required=True, type=Path, metavar="FILE", help="JSON to write")
    multiplying.add_argument(
        "--task", action="append", choices=TASKS, help="only this task; may be given again (default: all)"
    )
    multiplying.add_argument("--count", type=positive, default=60, metavar="N", help="new per task (60)")
    multiplying.add_argument(
        "--seeds", type=Path, metavar="FILE", help="other seeds, in the form of the output (default: ours)"
    )
    multiplying.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the endpoint's key, if it wants one (OPENAI_API_KEY)",
    )
    multiplying.add_argument("--temperature", type=float, default=1.0, help="of the sampling (1)")
    multiplying.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="an answer (120)"
    )
    multiplying.add_argument(
        "--per-request", type=positive, default=10, metavar="N", help="asked at once (10)"
    )
    multiplying.add_argument("--seed", type=int, default=0, help="of the order of the seeds (0)")
    return _multiply(parser.parse_args(argv), TASKS)


def _multiply(options: argparse.Namespace, tasks: Sequence[str]) -> int:
    from visionllm.atomic_file import write_json
    from visionllm.instruction.corpus import EVAL_TEMPLATES, TRAIN_TEMPLATES, load_templates
    from visionllm.instruction.multiply import Endpoint, multiply

    seeds = TRAIN_TEMPLATES if options.seeds is None else load_templates(options.seeds)
    asked = options.task or [task for task in tasks if seeds.get(task)]
    for task in asked:
        if not seeds.get(task):
            raise ValueError(f"{options.seeds}: expected seeds for {task}, got none")
    endpoint = Endpoint(
        options.endpoint,
        options.model,
        os.environ.get(options.key_variable) or None,
        options.temperature,
        options.timeout,
    )
    written: dict[str, dict[str, list[str]]] = {}
    enough = True
    for task in asked:
        known = [template.text for template in (*TRAIN_TEMPLATES[task], *EVAL_TEMPLATES[task])]
        result = multiply(
            seeds[task], options.count, endpoint.complete, known, options.per_request, options.seed
        )
        written[task] = {"train": result.accepted}
        # After every task: what has come so far is kept if the endpoint fails later.
        write_json(options.output, written)
        refused = ", ".join(f"{count} {reason}" for reason, count in result.refused.most_common())
        print(
            f"{task}: {len(result.accepted)} of {options.count} new in {result.requests} requests; "
            f"refused: {refused or 'none'}"
        )
        enough = enough and len(result.accepted) == options.count
    if not enough:
        print("visionllm instructions: fewer than asked for", file=sys.stderr)
    return 0 if enough else 1
