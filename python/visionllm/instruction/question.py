"""The question of a visual-question instruction, found in the words around it.

In this order: the wordings of the corpus that speak of a question or an answer, the longest that fits; what
follows "question:"; the corpus's other wordings; the text without its image clause.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

_QUESTION = re.compile(r"question:", re.IGNORECASE)
_MARK = re.compile(r"question|answer|asked|asks|reply|\bQ:", re.IGNORECASE)
_IMAGE_CLAUSE = re.compile(
    r"(?:the image is:?|with the objects in the|\A(?:in|for|given|see|look at)(?: the)?)\Z", re.I
)


class _Frame(NamedTuple):
    before: str
    after: str


@cache
def _frames() -> tuple[tuple[_Frame, ...], tuple[_Frame, ...]]:
    """What stands around the question in the corpus: wordings that tell of one, and others; longest first."""
    from .corpus import EVAL_TEMPLATES, TRAIN_TEMPLATES

    frames = {
        _Frame(*template.text.split("<question>"))
        for template in (*TRAIN_TEMPLATES["vqa"], *EVAL_TEMPLATES["vqa"])
    }
    ordered = sorted(frames, key=lambda frame: (-len(frame.before) - len(frame.after), frame))
    marked = [frame for frame in ordered if _MARK.search(frame.before + frame.after) is not None]
    return tuple(marked), tuple(frame for frame in ordered if frame not in marked)


def _framed(text: str, frames: tuple[_Frame, ...]) -> str | None:
    for frame in frames:
        if len(text) > len(frame.before) + len(frame.after) and text.startswith(frame.before):
            if text.endswith(frame.after):
                question = text[len(frame.before) : len(text) - len(frame.after)]
                if question == question.strip() and "<image>" not in question:
                    return question
    return None


def marked_question(text: str) -> str | None:
    """The question of a text that says that there is one; None if it does not."""
    question = _framed(text, _frames()[0])
    match = _QUESTION.search(text) if question is None else None
    if match is not None:
        following = text[match.end() :].strip()
        question = following if following and "<image>" not in following else unmarked_question(text)
    return question


def unmarked_question(text: str) -> str:
    """The question of a text that is one, such as ``The image is: <image>. Who sits?``."""
    question = _framed(text, _frames()[1])
    if question is not None:
        return question
    before, _, after = text.partition("<image>")
    before = before.rstrip()
    stripped = _IMAGE_CLAUSE.sub("", before)
    if not stripped:
        return after.lstrip(" .,:").strip() or text.strip()
    if stripped != before:
        return f"{stripped} {after.lstrip(' .,:')}".strip()
    # The picture is named within the question, "How many dogs are in <image>?".
    return f"{before} {'image' if before.lower().endswith(' the') else 'the image'}{after}".strip()
