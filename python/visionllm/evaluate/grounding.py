"""Referring expressions: is the best box on the object, and is what is not there said to be absent?

P@0.5, the number of RefCOCO's tables: the share of expressions whose best-scored box has an IoU of 0.5 or
more with the object (with one of them where the expression fits several). Expressions that fit nothing are
counted apart: an expression is said to be absent where the result shows no box for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from visionllm.evaluate.batches import batches
from visionllm.evaluate.matching import IOU_FOUND, box_iou
from visionllm.evaluate.samples import SampleSet

if TYPE_CHECKING:
    from visionllm.data.sample import Expression
    from visionllm.instruction import Template
    from visionllm.pipeline import VisionLLM
    from visionllm.result import Result


@dataclass(frozen=True)
class GroundedExpression:
    """One expression and what was said.

    Attributes:
        image_id: of the picture.
        text: the expression.
        present: whether something in the picture fits it.
        box: the best box, x1, y1, x2, y2 in pixels; None without one.
        score: of the box, 0 without one.
        said_absent: whether the result shows no box: its score is too low, or that of absence too high.
        absent: the score that nothing fits; None where the model does not say it.
        iou: the box's largest overlap with what fits, 0 where nothing does.
        error: why the model's answer could not be read; None where it could.
    """

    image_id: int | str
    text: str
    present: bool
    box: tuple[float, float, float, float] | None
    score: float
    said_absent: bool
    absent: float | None
    iou: float
    error: str | None = None

    @property
    def right(self) -> bool:
        """The box is on the object and not taken back, or the absence is said."""
        if not self.present:
            return self.said_absent
        return self.iou >= IOU_FOUND and not self.said_absent


@dataclass(frozen=True)
class GroundingEvaluation:
    """All expressions of a set, with what was said."""

    expressions: list[GroundedExpression]

    def to_dict(self) -> dict[str, Any]:
        """The counts and numbers; None where there is nothing to count.

        ``P@0.5`` of the expressions that fit something; ``P@0.5_answered``: the same where an object said to
        be absent counts as not found; ``accuracy``: right answers to all expressions, absent ones among
        them; ``absent_found``: share of the absent ones said to be absent; ``absent_said_wrongly``: share of
        the others; ``absent_auc``: probability that an absent expression's absence score is above another's;
        ``mean_iou``.
        """
        present = [one for one in self.expressions if one.present]
        absent = [one for one in self.expressions if not one.present]
        return {
            "expressions": len(self.expressions),
            "present": len(present),
            "absent": len(absent),
            "P@0.5": share([one.iou >= IOU_FOUND for one in present]),
            "P@0.5_answered": share([one.right for one in present]),
            "accuracy": share([one.right for one in self.expressions]),
            "mean_iou": share([one.iou for one in present]),
            "absent_found": share([one.said_absent for one in absent]),
            "absent_said_wrongly": share([one.said_absent for one in present]),
            "absent_auc": _area_under_curve(
                [one.absent for one in absent if one.absent is not None],
                [one.absent for one in present if one.absent is not None],
            ),
            "malformed": sum(one.error is not None for one in self.expressions),
        }


def evaluate_grounding(
    model: VisionLLM,
    dataset: SampleSet,
    template: Template | None = None,
    at_once: int = 1,
    batch_size: int = 8,
    done: Callable[[int], object] = lambda count: None,
) -> GroundingEvaluation:
    """Asks for every expression of every picture.

    Args:
        model: a loaded model.
        dataset: samples with expressions.
        template: the wording of the prompts; None: the default one.
        at_once: expressions in one prompt.
        batch_size: prompts in one pass.
        done: told the number of expressions after each pass.

    Raises:
        ValueError: no sample has an expression.
    """
    from visionllm.request import class_request

    prompts = [
        (index, group)
        for index, sample in enumerate(dataset.samples)
        for group in _groups(sample.expressions, at_once)
    ]
    if not prompts:
        raise ValueError("grounding: expected samples with expressions, got none")
    found: list[GroundedExpression] = []
    for chosen, pixels in batches(dataset, prompts, batch_size):
        requests = [
            class_request([one.text for one in group], template, task="grounding") for _, group in chosen
        ]
        results = model.run(pixels, requests, model.threshold)
        for (index, group), result in zip(chosen, results, strict=True):
            boxes = dataset.samples[index].boxes
            image_id = dataset.images[index]["id"]
            for label, expression in enumerate(group):
                found.append(_grounded(image_id, expression, result, label, boxes))
        done(sum(len(group) for _, group in chosen))
    return GroundingEvaluation(found)


def _groups(expressions: Sequence[Expression], at_once: int) -> Iterator[list[Expression]]:
    """At most ``at_once`` expressions each, in order; the same words twice are not asked at once."""
    group: list[Expression] = []
    for expression in expressions:
        if len(group) == at_once or any(expression.text == other.text for other in group):
            yield group
            group = []
        group.append(expression)
    if group:
        yield group


def _grounded(
    image_id: int | str, expression: Expression, result: Result, label: int, boxes: np.ndarray
) -> GroundedExpression:
    """What was said of one expression, whose objects are among the boxes xyxy ``[n, 4]``."""
    candidates = np.flatnonzero(result.all_boxes.labels == label)
    best = result.all_boxes.box(int(candidates[0])) if len(candidates) else None
    wanted = boxes[list(expression.objects)].astype(np.float64).reshape(-1, 4)
    shown = result.boxes.labels == label
    iou = 0.0
    if best is not None and len(wanted):
        iou = float(box_iou(np.array([best.xyxy]), wanted).max())
    return GroundedExpression(
        image_id=image_id,
        text=expression.text,
        present=bool(expression.objects),
        box=None if best is None else best.xyxy,
        score=0.0 if best is None else best.score,
        said_absent=not shown.any(),
        absent=None if result.absent is None else float(result.absent[label]),
        iou=iou,
        error=None if result.error is None else str(result.error),
    )


def share(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return float(np.mean(values)) if len(values) else None


def _area_under_curve(higher: Sequence[float], lower: Sequence[float]) -> float | None:
    """The probability that a number of the first is above one of the second; ties count half."""
    if not higher or not lower:
        return None
    first, second = np.array(higher)[:, None], np.array(lower)[None, :]
    return float(((first > second) + 0.5 * (first == second)).mean())
