"""What the training experiments compare: T3a, T3b, T3c, T4a to T4d, and what unmatched queries are taught."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from visionllm.instruction.instruction import TASKS
from visionllm.reproduce import paper
from visionllm.reproduce.data import evaluation_set, usual_classes
from visionllm.reproduce.detection import box_numbers, changed_config, evaluate_classes
from visionllm.reproduce.settings import Settings
from visionllm.reproduce.table import Row
from visionllm.reproduce.training import NOISE, Ablation, Numbers, Variant
from visionllm.train.config import TrainConfig

if TYPE_CHECKING:
    from visionllm.pipeline import VisionLLM

# A description, a class set and an order that never change. The first template stands for the description.
FIXED_DESCRIPTION = "mixture.descriptions=1"
FIXED_CLASSES = "mixture.prompts.random_classes=false"
EVERY_TASK = f"mixture.tasks={{{', '.join(f'{task}: 1' for task in TASKS)}}}"
# All that LLaMA brings; adapters and the rows that this model adds stay trainable, as in the paper.
FROZEN_LLM = "frozen=[llm.*.weight]"
# What reads the image tokens; and the rows and adapters that are added to an LLM.
LLM_SIDE = ("llm.*", "slot_queries.*", "slot_head.*", "class_tokens.*")
# What makes queries of the encoder's features, where pooling needs nothing.
QUERY_SIDE = tuple(
    f"image_tokenizer.{part}*"
    for part in ("queries", "denoising_query", "proposal_", "box", "decoder", "objectness")
)
ADDED = ("llm.*.lora_?", "slot_queries.*", "slot_head.*", "class_tokens.*")
TEXT_SIDE = ("text_encoder.*", "image_tokenizer.fusion.*", "alignment.*", *LLM_SIDE)
NOT_CONVERGED = 0.2  # of the AP that the same time gives in parallel


def measure_boxes(model: VisionLLM, settings: Settings, config: TrainConfig) -> Numbers:
    """Box AP with the 80 usual classes listed in every prompt."""
    if config.objective == "sequence":
        from visionllm.train.sequence import find_in_sequence

        network = model.network
        network.find = functools.partial(find_in_sequence, network)  # type: ignore[method-assign]
    dataset = evaluation_set(settings, size=config.image_size)
    found, _ = evaluate_classes(model, dataset, usual_classes(dataset), settings.batch_size)
    numbers = box_numbers(found)
    return {name: numbers[name] for name in ("AP", "AP50", "AP75")}


def measure_decoded(model: VisionLLM, settings: Settings, config: TrainConfig) -> Numbers:
    """Box AP as usual, by expectation near the best bin, and by the best bin alone, as the paper decodes."""
    numbers = measure_boxes(model, settings, config)
    with changed_config(model) as change:
        change(coordinate_window=0)
        alone = measure_boxes(model, settings, config)
    return {**{name: alone[name] for name in ("AP", "AP50", "AP75")}, "AP by expectation": numbers["AP"]}


def measure_boxes_and_grounding(model: VisionLLM, settings: Settings, config: TrainConfig) -> Numbers:
    """Box AP and the P@0.5 of referring expressions."""
    from visionllm.reproduce.tasks import grounding_precision

    numbers = measure_boxes(model, settings, config)
    return {"AP": numbers["AP"], "P@0.5": grounding_precision(model, settings, config.image_size)}


def sequence_verdict(rows: Sequence[Row]) -> str:
    """T4d: in sequence it does not converge where in parallel it does."""
    sequence, parallel = (row.ours["AP"] or 0.0 for row in rows)
    answer = "holds" if sequence < NOT_CONVERGED * parallel else "does not hold"
    return (
        f"**The paper's finding {answer}** (token by token does not converge): in the same time "
        f"{sequence:.1f} AP token by token, {parallel:.1f} in parallel."
    )


def best_verdict(rows: Sequence[Row]) -> str:
    """The row with the highest AP, and by how much."""
    first, second = sorted(rows, key=lambda row: -(row.ours["AP"] or 0.0))[:2]
    lead = (first.ours["AP"] or 0.0) - (second.ours["AP"] or 0.0)
    noise = max(NOISE, 2 * math.hypot(first.error.get("AP", 0.0), second.error.get("AP", 0.0)))
    answer = "is the best" if lead > noise else f"is not told apart from “{second.name}”"
    return f"**“{first.name}” {answer}**: {first.ours['AP']:.1f} AP, {lead:.1f} points more than the next."


def _variants(
    changes: Mapping[str, tuple[str, ...]],
    numbers: Mapping[str, paper.Numbers],
    notes: Mapping[str, str] = {},
) -> tuple[Variant, ...]:
    return tuple(
        Variant(name, words, numbers.get(name, {}), notes.get(name, "")) for name, words in changes.items()
    )


ABLATIONS = {
    "T3a": Ablation(
        "T3a",
        "text encoder of the image tokenizer",
        _variants(
            {
                "no text encoder": ("model.text_guidance=false",),
                "trained": (),
                "frozen": ("frozen=[text_encoder.*]",),
            },
            paper.T3A,
        ),
        measure_boxes_and_grounding,
        column="P@0.5",
        common=("mixture.tasks={detection: 1, grounding: 1}",),
        notes=(
            "P@0.5: of referring expressions on the same kind of pictures (paper: RefCOCO). The paper's "
            "frozen encoder is a pretrained BERT; this one is as it was initialised.",
        ),
        heading="text encoder",
        fresh=TEXT_SIDE,
    ),
    "T3b": Ablation(
        "T3b",
        "what image tokens are: pooled features or queries",
        _variants({"average pooling": ("model.image_tokens=pooling",), "queries": ()}, paper.T3B),
        measure_boxes,
        notes=("As many tokens in both: 64, for pooling the cells of an 8 × 8 grid.",),
        heading="image tokens",
        fresh=(*QUERY_SIDE, *LLM_SIDE),
    ),
    "T3c": Ablation(
        "T3c",
        "number of location tokens",
        _variants(
            {
                "257": ("model.location_bins=257",),
                "513": ("model.location_bins=513",),
                "1025": (),
                "2049": ("model.location_bins=2049",),
            },
            paper.T3C,
        ),
        measure_decoded,
        notes=(
            "AP is of the best token, as in the paper; this project's models take the expectation near it.",
        ),
        heading="tokens",
        fresh=LLM_SIDE,
    ),
    "T4a": Ablation(
        "T4a",
        "what is drawn at random in training",
        _variants(
            {
                "none": (FIXED_DESCRIPTION, FIXED_CLASSES),
                "+ random description": (FIXED_CLASSES,),
                "++ random categories": (),
                "+++ random output format": (EVERY_TASK,),
            },
            paper.T4A,
        ),
        measure_boxes,
        notes=(
            "Evaluated with the default wording and the 80 classes in file order. "
            "Random output format: all tasks together.",
        ),
        heading="randomness",
        fresh=LLM_SIDE,
    ),
    "T4b": Ablation(
        "T4b",
        "LoRA, with and without random prompts, the LLM's own weights frozen",
        _variants(
            {
                "no LoRA, no randomness": ("model.lora_rank=0", FROZEN_LLM, FIXED_DESCRIPTION, FIXED_CLASSES),
                "no LoRA, randomness": ("model.lora_rank=0", FROZEN_LLM),
                "LoRA, randomness": (FROZEN_LLM,),
                "whole LLM trained, randomness": (),
            },
            paper.T4B,
            {"whole LLM trained, randomness": "this project's way"},
        ),
        measure_boxes,
        notes=(
            "The paper's LLM is a pretrained LLaMA; this one is small and as it was initialised, so that "
            "what is frozen is random, unless the runs start from trained weights. The last row trains it.",
        ),
        fresh=ADDED,
    ),
    "T4c": Ablation(
        "T4c",
        "number of image tokens",
        _variants({str(count): (f"model.num_queries={count}",) for count in (50, 100, 200, 300)}, paper.T4C),
        measure_boxes,
        notes=("The time is the same for all, so more tokens mean fewer steps.",),
        heading="image tokens",
        fresh=LLM_SIDE,
    ),
    "T4d": Ablation(
        "T4d",
        "token by token instead of output format as query",
        _variants(
            {"sequence": ("objective=sequence",), "queries in parallel": ()},
            paper.T4D,
            {"sequence": "paper: does not converge"},
        ),
        measure_boxes,
        notes=(
            "In sequence: the classes and coordinates of all objects one after the other, in random order, "
            "each token given those before it (Pix2Seq, arXiv:2109.10852); a box's score is its class's.",
        ),
        heading="decoding",
        fresh=LLM_SIDE,
        verdict=sequence_verdict,
    ),
    "unmatched": Ablation(
        "unmatched",
        "what queries without an object are taught",
        _variants(
            {
                "nothing (weight 0)": ("no_object_weight=0", "unlisted_weight=0"),
                "no object, weight 0.05": ("no_object_weight=0.05",),
                "no object, weight 0.2": (),
                "no object, weight 1": ("no_object_weight=1",),
            },
            {},
            {"no object, weight 0.2": "this project's choice"},
        ),
        measure_boxes,
        notes=(
            "The paper does not say. The weight is that of an unmatched group of slots in the class loss; a "
            "matched one has 1.",
        ),
        fresh=LLM_SIDE,
        verdict=best_verdict,
    ),
}
