"""The numbers that the paper gives, by experiment and row, in points.

VisionLLM, arXiv:2305.11175: tables 1 to 4 and figure 6, with ResNet-50 where nothing else is said. COCO is
minival, RefCOCO its validation part, captions the Karpathy test part without beam search.
"""

from __future__ import annotations

BOX_NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

Numbers = dict[str, float]


def _table(columns: tuple[str, ...], rows: dict[str, tuple[float, ...]]) -> dict[str, Numbers]:
    return {name: dict(zip(columns, values, strict=True)) for name, values in rows.items()}


# T1, task by task: (ResNet-50, all tasks together; InternImage-H).
T1 = _table(
    ("paper R50", "paper H"),
    {
        "detection, AP": (44.6, 60.2),
        "detection, AP50": (64.0, 79.3),
        "detection, AP75": (48.1, 65.8),
        "segmentation, mask AP": (25.1, 30.6),
        "segmentation, mask AP50": (50.0, 61.2),
        "segmentation, mask AP75": (22.4, 27.6),
        "grounding, P@0.5": (80.6, 86.7),
        "captioning, BLEU-4": (31.0, 32.1),
        "captioning, CIDEr": (112.5, 114.2),
    },
)

# T2a: by the number of classes that the prompt lists, means over those classes.
T2A = _table(
    BOX_NUMBERS,
    {
        "10": (48.9, 72.6, 51.2, 31.7, 47.5, 67.3),
        "20": (52.7, 73.6, 56.8, 31.8, 53.2, 70.5),
        "40": (49.3, 70.7, 53.2, 33.1, 53.6, 63.8),
        "80": (44.6, 64.0, 48.1, 26.7, 47.9, 60.5),
    },
)

# T2b: mask AP by the number of boundary points.
T2B = _table(
    BOX_NUMBERS,
    {
        "8": (18.5, 45.7, 11.6, 9.9, 19.7, 28.7),
        "14": (22.9, 48.3, 19.4, 11.0, 25.1, 36.0),
        "16": (24.2, 49.9, 20.9, 11.5, 26.3, 36.8),
        "24": (25.1, 50.0, 22.4, 12.5, 27.4, 38.2),
    },
)

# T3a: box AP on COCO and P@0.5 on RefCOCO.
T3A = _table(
    ("AP", "P@0.5"),
    {"no text encoder": (44.7, 48.1), "trained": (44.8, 84.1), "frozen": (1.3, 34.3)},
)
T3B = _table(("AP",), {"average pooling": (23.1,), "queries": (44.8,)})
T3C = _table(("AP",), {"257": (34.9,), "513": (40.8,), "1025": (44.8,), "2049": (44.8,)})
T4A = _table(
    ("AP",),
    {
        "none": (45.2,),
        "+ random description": (45.1,),
        "++ random categories": (44.8,),
        "+++ random output format": (44.6,),
    },
)
T4B = _table(
    ("AP",),
    {
        "no LoRA, no randomness": (45.2,),
        "no LoRA, randomness": (1.2,),
        "LoRA, randomness": (44.8,),
    },
)
T4C = _table(("AP",), {"50": (44.5,), "100": (44.8,), "200": (45.1,), "300": (45.2,)})
T4D = _table(("AP",), {"queries in parallel": (44.8,)})  # in sequence: no number, it does not converge
T4E = _table(("AP",), {"80": (44.8,), "1203": (18.9,)})
FIG6_SPREAD = 0.1  # AP between the best and the worst of six descriptions and two class orders
