"""Output formats in words that no rule of the parser reads: does the model write the right one?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from visionllm.evaluate.grounding import share
from visionllm.instruction import InstructionError, format_text
from visionllm.instruction.format_phrasings import FormatPhrasing, evaluation_phrasings

if TYPE_CHECKING:
    from visionllm.pipeline import VisionLLM

CLASS_SET = '{"cat": <c0>, "big dog": <c1>}'  # in the place of a phrasing's <class>


@dataclass(frozen=True)
class WrittenFormat:
    """One phrasing.

    Attributes:
        text: the instruction.
        right: its output format.
        said: what it was understood as; empty where ``error`` says why it was not.
    """

    text: str
    right: str
    said: str
    error: str | None = None


@dataclass(frozen=True)
class FormatEvaluation:
    """All phrasings, with what was understood."""

    formats: list[WrittenFormat]

    def to_dict(self) -> dict[str, Any]:
        """``phrasings``; ``exact``, the share understood rightly, also of boxes and of longer formats alone
        (None where there are none); ``malformed``, how many could not be read."""
        box = format_text(2)
        right = {True: list[bool](), False: list[bool]()}
        for one in self.formats:
            right[one.right == box].append(one.said == one.right)
        return {
            "phrasings": len(self.formats),
            "exact": share([*right[True], *right[False]]),
            "exact_boxes": share(right[True]),
            "exact_points": share(right[False]),
            "malformed": sum(one.error is not None for one in self.formats),
        }


def evaluate_formats(
    model: VisionLLM,
    phrasings: Sequence[FormatPhrasing] = (),
    batch_size: int = 8,
    done: Callable[[int], object] = lambda count: None,
) -> FormatEvaluation:
    """Asks the whole way: the parser gives up, the model writes the format, the parser reads that.

    Args:
        model: a loaded model.
        phrasings: none: those that are kept for evaluation.
        batch_size: phrasings in one pass.
        done: told the number of phrasings after each pass.
    """
    asked = list(phrasings or evaluation_phrasings())
    found = []
    for start in range(0, len(asked), batch_size):
        chosen = asked[start : start + batch_size]
        texts = [one.text.replace("<class>", CLASS_SET) for one in chosen]
        for phrasing, text, said in zip(chosen, texts, _understood(model, texts), strict=True):
            error = None if isinstance(said, str) else str(said)
            found.append(WrittenFormat(text, phrasing.format, said if isinstance(said, str) else "", error))
        done(len(chosen))
    return FormatEvaluation(found)


def _understood(model: VisionLLM, texts: Sequence[str]) -> list[str | InstructionError]:
    """The format of each, or why there is none."""
    try:
        return [format_text(one.instructions[0].points) for one in model.requests(texts)]
    except InstructionError as error:
        if len(texts) == 1:
            return [error]
        return [_understood(model, [text])[0] for text in texts]
