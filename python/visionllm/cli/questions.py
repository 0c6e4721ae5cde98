"""What ``visionllm predict`` is asked: one option for each task, or an instruction in words."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from visionllm.cli.arguments import positive
from visionllm.instruction import Instruction
from visionllm.instruction.instruction import LENGTHS, SET_TASKS, UnknownFormat
from visionllm.request import Request, class_request, request_of
from visionllm.text_options import TextOptions

DEFAULT_POINTS = 16  # of a polygon


@dataclass(frozen=True)
class Question:
    """What is asked of every picture.

    Attributes:
        request: asks the loaded model, which an output format that the parser does not know is left to.
        options: how texts are written.
    """

    request: Callable[[Any], Request]
    options: TextOptions


def add_questions(parser: argparse.ArgumentParser) -> None:
    """The options; exactly one of the first five is needed."""
    tasks = parser.add_argument_group("what is asked (one of the first five)")
    asked = tasks.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--instruction", metavar="TEXT", help="any task, in words; <image> stands for the picture"
    )
    asked.add_argument("--classes", metavar="NAME,NAME", help="what to find, as names: dog,red car")
    asked.add_argument(
        "--ground",
        metavar="TEXT",
        action="append",
        help="find what an expression describes, or that it is absent; may be given several times",
    )
    asked.add_argument(
        "--caption",
        nargs="?",
        const="short",
        choices=LENGTHS,
        help="describe the picture: short (the default), long or detailed",
    )
    asked.add_argument("--question", metavar="TEXT", help="answer a question about the picture")
    tasks.add_argument("--segment", action="store_true", help="with --classes: outlines and masks, not boxes")
    tasks.add_argument(
        "--points",
        type=positive,
        metavar="N",
        help=f"with --segment: points of an outline ({DEFAULT_POINTS})",
    )
    tasks.add_argument(
        "--keypoints", metavar="NAME,NAME", help="with --classes: the points of these names on every object"
    )
    words = parser.add_argument_group("how captions and answers are written")
    words.add_argument("--stream", action="store_true", help="show words as they come, one picture at a time")
    words.add_argument(
        "--beams", type=positive, default=1, metavar="N", help="hypotheses of a beam search (1)"
    )
    words.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="of sampling; 0: none (0)"
    )
    words.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest words (1)"
    )
    words.add_argument("--max-tokens", type=positive, default=128, metavar="N", help="longest text (128)")
    words.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (0)")


def read_question(options: argparse.Namespace) -> Question:
    """What the options ask.

    Raises:
        ValueError: they do not fit together, or the instruction is none; only an output format that the
            parser does not know is left to the model.
    """
    _check_fit(options)
    request = _read_request(options)
    if options.stream and (request is None or request.task in SET_TASKS):
        raise ValueError("--stream: expected --caption, --question or an --instruction for a text")
    text_options = TextOptions(
        options.max_tokens, options.temperature, options.top_p, options.beams, options.seed
    )
    if request is None:
        return Question(lambda model: model.requests([options.instruction])[0], text_options)
    return Question(lambda model: request, text_options)


def _read_request(options: argparse.Namespace) -> Request | None:
    """None: an instruction whose output format is left to the model."""
    if options.instruction is not None:
        try:
            return request_of(options.instruction)
        except UnknownFormat:
            return None
    if options.ground is not None:
        return class_request(options.ground, task="grounding")
    if options.caption is not None:
        return request_of(Instruction("captioning", length=options.caption))
    if options.question is not None:
        return request_of(Instruction("vqa", question=options.question.strip()))
    classes = _names(options.classes)
    if options.segment:
        return class_request(classes, task="segmentation", points=options.points or DEFAULT_POINTS)
    if options.keypoints is not None:
        return class_request(classes, task="keypoints", keypoints=_names(options.keypoints))
    return class_request(classes)


def _check_fit(options: argparse.Namespace) -> None:
    needs = (
        ("--segment", options.segment, "--classes", options.classes is not None),
        ("--keypoints", options.keypoints is not None, "--classes", options.classes is not None),
        ("--points", options.points is not None, "--segment", options.segment),
    )
    for name, given, other, there in needs:
        if given and not there:
            raise ValueError(f"{name}: expected {other} beside it")
    if options.segment and options.keypoints is not None:
        raise ValueError("--segment and --keypoints: expected one of them")
    if options.stream and options.beams > 1:
        raise ValueError(
            f"--stream: expected one beam, as words come one by one, got --beams {options.beams}"
        )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _temperature(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return value
