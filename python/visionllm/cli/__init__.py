"""The command ``visionllm``: finds the subcommand's function, which has an argument parser of its own.

Only the subcommand's modules are imported: those that need no torch do not wait for it. Exit codes: 0 all
done, 1 something failed, 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import visionllm


class Command(NamedTuple):
    """Where a subcommand's ``main(argv)`` lives and what it is for."""

    module: str
    function: str
    purpose: str


COMMANDS = {
    "predict": Command("visionllm.cli.predict", "main", "find objects in pictures"),
    "evaluate": Command("visionllm.cli.evaluate", "main", "measure a model on a COCO-format data set"),
    "train": Command("visionllm.train", "main", "train a model"),
    "plan": Command("visionllm.cli.plan", "main", "say what memory a training run needs"),
    "convert": Command("visionllm.cli.convert", "main", "make a model of published weights"),
    "adapter": Command("visionllm.cli.adapter", "main", "take what was trained out of a model's folder"),
    "reproduce": Command("visionllm.cli.reproduce", "main", "run the paper's experiments"),
    "scenes": Command(
        "visionllm.data.scenes.export", "main", "write generated scenes as a COCO-format data set"
    ),
    "glyphs": Command("visionllm.data.scenes.glyphs", "main", "collect the glyphs that scenes are made of"),
    "validate": Command("visionllm.cli.validate", "main", "check a data set's annotations and pictures"),
    "instruction": Command("visionllm.cli.instruction", "main", "show how an instruction is understood"),
    "instructions": Command("visionllm.cli.instructions", "main", "have a model write more wordings"),
    "doctor": Command("visionllm.cli.doctor", "main", "show versions and what works on this machine"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, by default the process's own, and returns its exit code.

    Errors of files, values and what is not installed are one line on stderr, and so are those of torch and of
    our kernels; VISIONLLM_TRACEBACK=1 shows where they arose.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"visionllm {visionllm.__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        print(
            f"visionllm: unknown command {name!r}; expected one of {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    command = COMMANDS[name]
    try:
        function = getattr(importlib.import_module(command.module), command.function)
        return int(function(arguments[1:]) or 0)
    except KeyboardInterrupt:
        print(f"visionllm {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has left: no error of ours. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("VISIONLLM_TRACEBACK"):
            raise
        # A RuntimeError may be our own bug: its line says how to see more.
        hint = " (VISIONLLM_TRACEBACK=1 shows where)" if isinstance(error, RuntimeError) else ""
        print(f"visionllm {name}: {str(error) or type(error).__name__}{hint}", file=sys.stderr)
        return 1


def usage() -> str:
    """The list of subcommands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.purpose}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: visionllm COMMAND ...", "", *lines, "", "`visionllm COMMAND --help` shows its options."]
    )
