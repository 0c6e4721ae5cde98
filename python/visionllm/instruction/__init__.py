"""The instruction language: text to a typed instruction and back, wordings to train on, and the answers."""

from __future__ import annotations

from .answer import Answer, MalformedAnswer, box_numbers, format_answer, parse_answer, pixel_points
from .corpus import EVAL_TEMPLATES, TRAIN_TEMPLATES
from .instruction import Instruction, InstructionError, Segment, UnknownFormat
from .output_format import parse_format
from .parse import parse
from .render import Template, class_set_text, format_text

__all__ = [
    "EVAL_TEMPLATES",
    "TRAIN_TEMPLATES",
    "Answer",
    "Instruction",
    "InstructionError",
    "MalformedAnswer",
    "Segment",
    "Template",
    "UnknownFormat",
    "box_numbers",
    "class_set_text",
    "format_answer",
    "format_text",
    "parse",
    "parse_answer",
    "parse_format",
    "pixel_points",
]
