"""Questions about pictures: exact match and token F1 of the answers, by kind of question.

Answers are compared as the VQA evaluation does (arXiv 1505.00468): lower case, without punctuation and
articles, numbers up to ten as digits. F1 is that of the words two answers share (SQuAD, arXiv 1606.05250).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from visionllm.data.sample import Question
from visionllm.evaluate.batches import batches
from visionllm.evaluate.grounding import share
from visionllm.evaluate.samples import SampleSet

if TYPE_CHECKING:
    from visionllm.instruction import Template
    from visionllm.pipeline import VisionLLM
    from visionllm.text_options import TextOptions

_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = frozenset(["a", "an", "the"])
_WORD = re.compile(r"\d+(?:[.,:]\d+)*|\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class SaidAnswer:
    """One question, its right answer and the model's."""

    image_id: int | str
    question: str
    kind: str
    answer: str
    said: str
    error: str | None = None


@dataclass(frozen=True)
class AnswerEvaluation:
    """All answers of a set."""

    answers: list[SaidAnswer]

    def to_dict(self) -> dict[str, Any]:
        """``questions``, ``exact_match``, ``f1``, ``malformed``; the first three also ``by_kind``."""
        kinds = sorted({one.kind for one in self.answers})
        by_kind = {
            kind: _numbers([one for one in self.answers if one.kind == kind]) for kind in kinds if kind
        }
        malformed = sum(one.error is not None for one in self.answers)
        return {**_numbers(self.answers), "malformed": malformed, "by_kind": by_kind}


def _numbers(answers: list[SaidAnswer]) -> dict[str, Any]:
    return {
        "questions": len(answers),
        "exact_match": share([exact_match(one.said, one.answer) for one in answers]),
        "f1": share([token_f1(one.said, one.answer) for one in answers]),
    }


def evaluate_answers(
    model: VisionLLM,
    dataset: SampleSet,
    template: Template | None = None,
    options: TextOptions | None = None,
    batch_size: int = 8,
    done: Callable[[int], object] = lambda count: None,
) -> AnswerEvaluation:
    """Asks every question of every picture.

    Args:
        model: a loaded model.
        dataset: samples with questions.
        template: the wording of the prompts; None: the default one.
        options: how answers are written; None: greedily.
        batch_size: questions in one pass.
        done: told the number of questions after each pass.

    Raises:
        ValueError: no sample has a question.
    """
    from visionllm.instruction import Instruction
    from visionllm.request import request_of

    prompts: list[tuple[int, Question]] = [
        (index, question) for index, sample in enumerate(dataset.samples) for question in sample.questions
    ]
    if not prompts:
        raise ValueError("vqa: expected samples with questions, got none")
    said: list[SaidAnswer] = []
    for chosen, pixels in batches(dataset, prompts, batch_size):
        requests = [
            request_of(
                Instruction("vqa", question=question.text)
                if template is None
                else template.instruction((), question=question.text)
            )
            for _, question in chosen
        ]
        results = model.run(pixels, requests, model.threshold, options=options)
        for (index, question), result in zip(chosen, results, strict=True):
            image_id = dataset.images[index]["id"]
            error = None if result.error is None else str(result.error)
            said.append(
                SaidAnswer(image_id, question.text, question.kind, question.answer, result.text or "", error)
            )
        done(len(chosen))
    return AnswerEvaluation(said)


def answer_words(text: str) -> list[str]:
    """The words of an answer that count, numbers as digits."""
    words = [_DIGITS.get(word, word) for word in _WORD.findall(text.lower())]
    return [word for word in words if word not in _ARTICLES]


def exact_match(said: str, right: str) -> bool:
    """Whether two answers are the same words."""
    return answer_words(said) == answer_words(right)


def token_f1(said: str, right: str) -> float:
    """Harmonic mean of the shares of each answer's words that the other has; 1 for two empty ones."""
    first, second = Counter(answer_words(said)), Counter(answer_words(right))
    if not first or not second:
        return float(first == second)
    return 2 * (first & second).total() / (first.total() + second.total())
