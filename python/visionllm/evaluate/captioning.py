"""Captions: BLEU and CIDEr against the references of each length, and how long the captions are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from visionllm.data.sample import CAPTION_LENGTHS
from visionllm.evaluate.batches import batches
from visionllm.evaluate.caption_scores import caption_scores
from visionllm.evaluate.caption_words import caption_words
from visionllm.evaluate.grounding import share
from visionllm.evaluate.samples import SampleSet

if TYPE_CHECKING:
    from visionllm.instruction import Template
    from visionllm.pipeline import VisionLLM
    from visionllm.text_options import TextOptions


@dataclass(frozen=True)
class SaidCaption:
    """One caption: of which picture, in which length, what was said and what is right."""

    image_id: int | str
    length: str
    caption: str
    references: list[str] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class CaptionEvaluation:
    """All captions of a set."""

    captions: list[SaidCaption]

    def to_dict(self) -> dict[str, Any]:
        """The numbers of each length, by its name.

        ``pictures``; ``BLEU-1`` ... ``BLEU-4``, ``CIDEr``; ``words``, mean number of words of the captions,
        and ``reference_words``, that of the references; ``distinct``, how many different captions there are;
        ``malformed``.
        """
        numbers = {}
        for length in CAPTION_LENGTHS:
            said = [one for one in self.captions if one.length == length]
            if not said:
                continue
            references = [text for one in said for text in one.references]
            numbers[length] = {
                "pictures": len(said),
                **caption_scores([one.caption for one in said], [one.references for one in said]),
                "words": share([len(caption_words(one.caption)) for one in said]),
                "reference_words": share([len(caption_words(text)) for text in references]),
                "distinct": len({one.caption for one in said}),
                "malformed": sum(one.error is not None for one in said),
            }
        return numbers


def evaluate_captions(
    model: VisionLLM,
    dataset: SampleSet,
    lengths: Sequence[str] = CAPTION_LENGTHS,
    templates: Sequence[Template] = (),
    options: TextOptions | None = None,
    batch_size: int = 8,
    done: Callable[[int], object] = lambda count: None,
) -> CaptionEvaluation:
    """Asks for a caption of every length that a picture has references of.

    Args:
        model: a loaded model.
        dataset: samples with captions.
        lengths: which of CAPTION_LENGTHS.
        templates: a wording for some lengths, by their ``length``; the default one for the others.
        options: how captions are written; None: greedily.
        batch_size: prompts in one pass.
        done: told the number of captions after each pass.

    Raises:
        ValueError: a length is unknown, or no sample has references of one of them.
    """
    from visionllm.instruction import Instruction
    from visionllm.request import request_of

    wordings = {template.length: template for template in templates}
    requests = {}
    for length in lengths:
        if length not in CAPTION_LENGTHS:
            raise ValueError(f"lengths: expected some of {', '.join(CAPTION_LENGTHS)}, got {length!r}")
        wording = wordings.get(length)
        asked = Instruction("captioning", length=length) if wording is None else wording.instruction(())
        requests[length] = request_of(asked)
    prompts = [
        (index, length)
        for length in lengths
        for index, sample in enumerate(dataset.samples)
        if sample.captions.get(length)
    ]
    if not prompts:
        raise ValueError(f"captioning: expected samples with captions ({', '.join(lengths)}), got none")
    said: list[SaidCaption] = []
    for chosen, pixels in batches(dataset, prompts, batch_size):
        asked_now = [requests[length] for _, length in chosen]
        results = model.run(pixels, asked_now, model.threshold, options=options)
        for (index, length), result in zip(chosen, results, strict=True):
            said.append(
                SaidCaption(
                    dataset.images[index]["id"],
                    length,
                    result.text or "",
                    dataset.samples[index].captions[length],
                    None if result.error is None else str(result.error),
                )
            )
        done(len(chosen))
    return CaptionEvaluation(said)
