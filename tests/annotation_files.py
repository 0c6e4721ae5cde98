"""Small files of annotations in every format, with all the fields of the published ones."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco_mask

SQUARE = [4, 5, 14, 5, 14, 15, 4, 15]  # 100 square pixels
SMALL = [30, 20, 35, 20, 35, 25, 30, 25]  # 25
COCO = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 8, "file_name": "b.png", "width": 40, "height": 30, "not_exhaustive": [2]},
    ],
    "categories": [
        {"id": 1, "name": "person", "keypoints": ["nose", "left eye"], "skeleton": [[1, 2]]},
        {"id": 2, "name": "cup"},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [4, 5, 31, 20], "area": 125,
         "segmentation": [SMALL, SQUARE], "keypoints": [40.5, 9, 2, 3, 4, 0], "num_keypoints": 1},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 40, 30], "area": 600, "iscrowd": 1,
         "segmentation": {"size": [30, 40], "counts": [600, 600]}},
        {"id": 3, "image_id": 7, "category_id": 2, "bbox": [1, 1, 5, 6], "area": 30, "segmentation": []},
        {"id": 4, "image_id": 8, "category_id": 2, "bbox": [20, 0, 20, 30], "area": 600, "segmentation":
         {"size": [30, 40], "counts": coco_mask.encode(np.asfortranarray(
             np.repeat(np.arange(40) >= 20, 30).reshape(40, 30).T.astype(np.uint8)))["counts"].decode()}},
    ],
}  # fmt: skip

CAPTIONS = {
    "images": [
        {"id": 7, "file_name": "000000000007.jpg", "width": 40, "height": 30},
        {"id": 8, "file_name": "000000000008.jpg"},
        {"id": 9, "file_name": "000000000009.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "A cat\non a mat. "},
        {"id": 2, "image_id": 8, "caption": "A dog."},
        {"id": 3, "image_id": 7, "caption": "Cat."},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filepath": "val2014", "filename": f"COCO_val2014_00000000000{number}.jpg", "cocoid": number,
         "imgid": number - 7, "sentids": [0, 1], "split": split,
         "sentences": [{"raw": f"Picture {number}. ", "tokens": ["picture"], "sentid": 0, "imgid": 0},
                       {"raw": "Nice.", "tokens": ["nice"], "sentid": 1, "imgid": 0}]}
        for number, split in ((7, "train"), (8, "restval"), (9, "test"))
    ],
}  # fmt: skip
LLAVA = [
    {
        "id": "000000000007",
        "image": "000000000007.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is there?"},
            {"from": "gpt", "value": "A cat.\n\nIt sleeps."},
            {"from": "human", "value": "Where?"},
            {"from": "gpt", "value": "On a mat."},
        ],
    },
    {
        "id": "000000000007",
        "image": "000000000007.jpg",
        "conversations": [
            {"from": "human", "value": "Describe it in detail.\n<image>"},
            {"from": "gpt", "value": "A grey cat lies on a mat."},
        ],
    },
]

LVIS_URL = "http://images.cocodataset.org/train2017/00000000000"

LVIS = {
    "info": {},
    "images": [
        {"id": 7, "coco_url": LVIS_URL + "7.jpg", "width": 40, "height": 30, "neg_category_ids": [4, 2],
         "not_exhaustive_category_ids": [3]},
        {"id": 8, "coco_url": LVIS_URL + "8.jpg", "width": 40, "height": 30, "neg_category_ids": [],
         "not_exhaustive_category_ids": []},
    ],
    "categories": [
        {"id": 1, "name": "alarm_clock", "synset": "alarm_clock.n.01", "frequency": "c"},
        {"id": 2, "name": "arctic_(type_of_shoe)", "frequency": "r"},
        {"id": 3, "name": "banana", "frequency": "f"},
        {"id": 4, "name": "boot"},
    ],
    "annotations": [
        {"id": i, "image_id": image, "category_id": category, "bbox": [i, 2, 10, 8], "area": 60,
         "segmentation": [[i, 2, i + 10, 2, i + 10, 10, i, 10]]}
        for i, (image, category) in enumerate(((7, 1), (7, 3), (8, 3)))
    ],
}  # fmt: skip

REF_NAMES = {7: "COCO_train2014_000000000007.jpg", 8: "COCO_train2014_000000000008.jpg"}
REF_INSTANCES = {
    "info": {},
    "images": [{"id": key, "file_name": name, "width": 40, "height": 30} for key, name in REF_NAMES.items()],
    "categories": [{"id": 1, "name": "person", "supercategory": "person"}, {"id": 2, "name": "dog"}],
    "annotations": [
        {"id": 100 + i, "image_id": image, "category_id": category, "bbox": [i, 2, 10, 8], "area": 60,
         "iscrowd": 0, "segmentation": [[i, 2, i + 10, 2, i + 10, 10, i, 10]]}
        for i, (image, category) in enumerate(((7, 1), (7, 2), (8, 1), (7, 1)))
    ],
}  # fmt: skip


def ref(number, annotation, image, part, *sentences):
    """A reference with every field of the published files."""
    return {
        "ref_id": number, "ann_id": annotation, "image_id": image, "category_id": 1, "split": part,
        "file_name": f"COCO_train2014_{image:012d}_{number}.jpg", "sent_ids": list(range(len(sentences))),
        "sentences": [
            {"sent": text, "raw": text.upper(), "sent_id": i, "tokens": text.split()}
            for i, text in enumerate(sentences)
        ],
    }  # fmt: skip


REFS = [
    ref(0, 103, 7, "train", "man on the right", "the  older man"),
    ref(1, 102, 8, "testA", "only person"),
    ref(2, 101, 7, "val", "dog"),
]
