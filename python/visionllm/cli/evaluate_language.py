"""``visionllm evaluate`` for what is about words: grounding, captioning, vqa, and formats in words."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from visionllm.atomic_file import write_json

if TYPE_CHECKING:
    from visionllm.evaluate.samples import SampleSet
    from visionllm.instruction import Template
    from visionllm.pipeline import VisionLLM

LANGUAGE_TASKS = ("grounding", "captioning", "vqa")
FORMATS = "formats"  # beside the tasks: what instructions in words mean, without pictures
EXAMPLES = 5  # printed


def evaluate_language(
    model: VisionLLM,
    dataset: SampleSet,
    template: Template | None,
    options: argparse.Namespace,
    about: dict[str, Any],
) -> None:
    """Runs the task, writes metrics.json and predictions.json, prints the numbers and some examples."""
    from tqdm import tqdm

    with tqdm(total=_prompts(dataset, options), unit="prompt", disable=None) as progress:
        numbers, rows = _measured(model, dataset, template, options, progress.update)
    metrics = {**numbers, "task": options.task, "images": len(dataset.images), **about}
    write_json(options.output / "metrics.json", metrics)
    write_json(options.output / "predictions.json", [asdict(row) for row in rows], indent=None)
    if options.task == "captioning":
        for length, found in numbers.items():
            print(f"{length:<9} {numbers_text(found)}")
    else:
        for kind, found in numbers.get("by_kind", {}).items():
            print(f"{kind:<11} {numbers_text(found)}")
        print(numbers_text({name: value for name, value in numbers.items() if name != "by_kind"}))
    for row in rows[:: max(1, len(rows) // EXAMPLES)][:EXAMPLES]:
        print(f"  {example_text(row)}")
    print(f"written to {options.output}")


def evaluate_written_formats(model: VisionLLM, options: argparse.Namespace) -> None:
    """Output formats in words; writes metrics.json and predictions.json, prints the numbers and mistakes."""
    from visionllm.evaluate.formats import evaluate_formats

    found = evaluate_formats(model, batch_size=options.batch_size)
    metrics = {**found.to_dict(), "task": FORMATS, "model": str(options.model)}
    write_json(options.output / "metrics.json", metrics)
    write_json(options.output / "predictions.json", [asdict(one) for one in found.formats], indent=None)
    print(numbers_text(found.to_dict()))
    for one in [one for one in found.formats if one.said != one.right][:EXAMPLES]:
        print(f"  {one.text!r}: {one.said or one.error!r}; right: {one.right!r}")
    print(f"written to {options.output}")


def _prompts(dataset: SampleSet, options: argparse.Namespace) -> int:
    """What the evaluation will report as done."""
    if options.task == "grounding":
        return sum(len(sample.expressions) for sample in dataset.samples)
    if options.task == "vqa":
        return sum(len(sample.questions) for sample in dataset.samples)
    return sum(bool(one.captions.get(length)) for one in dataset.samples for length in options.lengths)


def _measured(
    model: VisionLLM, dataset: SampleSet, template: Template | None, options: argparse.Namespace, done: Any
) -> tuple[dict[str, Any], list[Any]]:
    """Numbers and rows of the task."""
    from visionllm.text_options import TextOptions

    if options.task == "grounding":
        from visionllm.evaluate.grounding import evaluate_grounding

        grounding = evaluate_grounding(model, dataset, template, options.at_once, options.batch_size, done)
        return grounding.to_dict(), grounding.expressions
    text = TextOptions(max_tokens=options.max_tokens, beams=options.beams)
    if options.task == "captioning":
        from visionllm.evaluate.captioning import evaluate_captions

        templates = [] if template is None else [template]
        captions = evaluate_captions(
            model, dataset, options.lengths, templates, text, options.batch_size, done
        )
        return captions.to_dict(), captions.captions
    from visionllm.evaluate.answering import evaluate_answers

    answers = evaluate_answers(model, dataset, template, text, options.batch_size, done)
    return answers.to_dict(), answers.answers


def numbers_text(numbers: dict[str, Any]) -> str:
    """The numbers in one line: counts as they are, shares in points, CIDEr as is usual times 100."""
    words = []
    for name, value in numbers.items():
        if value is None:
            continue
        if isinstance(value, int):
            words.append(f"{name} {value}")
        elif name in ("words", "reference_words"):
            words.append(f"{name} {value:.1f}")
        else:
            words.append(f"{name} {100 * value:.1f}")
    return "  ".join(words)


def example_text(row: Any) -> str:
    """One expression, caption or answer with what is right."""
    if hasattr(row, "caption"):
        return f"{row.image_id} ({row.length}): {row.caption!r}; right: {row.references[0]!r}"
    if hasattr(row, "question"):
        return f"{row.image_id}: {row.question!r}: {row.said!r}; right: {row.answer!r}"
    said = "absent" if row.said_absent else f"IoU {row.iou:.2f}"
    return f"{row.image_id}: {row.text!r}: {said}{'' if row.present else '; is absent'}"
