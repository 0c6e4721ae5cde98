"""Samples for `colour_network.ColourNetwork`: coloured rectangles, and all that is known of them."""

from __future__ import annotations

import numpy as np
from colour_network import COLOURS, PLACES, picture
from pycocotools import mask as coco_mask

from visionllm.data.sample import Expression, Question, Sample

RECTANGLES = [
    {"red": (16, 8, 48, 40), "blue": (80, 16, 112, 64)},
    {"green": (0, 0, 64, 32)},
    {"yellow": (8, 8, 120, 24), "pink": (8, 32, 40, 64), "red": (64, 32, 128, 64)},
    {},
]
POINTS = ("top left", "top right", "bottom right", "bottom left", "center")


def coloured_sample(index: int, rectangles: dict[str, tuple[int, int, int, int]]) -> Sample:
    image = picture(**rectangles)
    names = list(rectangles)
    boxes = np.array(list(rectangles.values()), np.float32).reshape(-1, 4)
    masks = [(image == COLOURS[name]).all(axis=2) for name in names]
    absent = next(name for name in COLOURS if name not in rectangles)
    captions = {"short": [" and ".join(sorted(names, key=list(COLOURS).index))]}
    captions["long"] = [f"a picture of {captions['short'][0]}"]
    return Sample(
        image=image,
        boxes=boxes,
        names=names,
        area=np.array([mask.sum() for mask in masks], np.float32).reshape(-1),
        iscrowd=np.zeros(len(names), bool),
        image_id=f"picture {index}",
        vocabulary=tuple(COLOURS),
        masks=[coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks],
        keypoints=[
            {
                name: (x1 + u * (x2 - x1), y1 + v * (y2 - y1), 1 if name == "center" else 2)
                for name, (u, v) in PLACES.items()
            }
            for x1, y1, x2, y2 in boxes.tolist()
        ],
        expressions=[
            *(Expression(f"the {name} thing", (k,)) for k, name in enumerate(names)),
            Expression(f"the {absent} one", ()),
        ],
        captions=captions if names else {},
        questions=[
            Question("how many colours are there ?", str(len(names)), "count"),
            Question("is there something ?", "yes" if names else "no", "yes_no"),
        ],
    )


def coloured_samples() -> list[Sample]:
    return [coloured_sample(index, rectangles) for index, rectangles in enumerate(RECTANGLES)]
