"""A result in other forms: plain values, COCO results, and the objects of the package supervision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from visionllm.boxes import Boxes
    from visionllm.result import Result


def plain_values(result: Result, spread: bool = False) -> dict[str, Any]:
    """What is shown, as JSON has it: see `Result.to_dict`."""
    content: dict[str, Any] = {
        "source": result.source,
        "width": result.width,
        "height": result.height,
        "task": result.task,
        "instruction": result.instruction.text or result.instruction.render(),
        "format_source": result.format_source,
        "boxes": [_plain_box(result, index, spread) for index in range(len(result))],
        "answer": result.answer(),
    }
    if result.expressions is not None:
        content["expressions"] = [
            {
                "expression": found.text,
                "found": found.box is not None,
                "score": None if found.box is None else round(found.box.score, 4),
                "absent": None if found.absent is None else round(found.absent, 4),
            }
            for found in result.expressions
        ]
    if result.text is not None:
        content["text"] = result.text
    if result.error is not None:
        content["error"] = str(result.error)
    return content


def _plain_box(result: Result, index: int, spread: bool) -> dict[str, Any]:
    boxes = result.boxes
    box = boxes.box(index)
    entry: dict[str, Any] = {
        "xyxy": _rounded(box.xyxy, 2),
        "label": box.name,
        "class": box.label,
        "score": round(box.score, 4),
    }
    if boxes.points is not None:
        if result.task == "segmentation":
            entry["polygon"] = _rounded(boxes.points[index].ravel(), 2)
        else:
            found = boxes.select(np.array([index])).keypoints()
            assert found is not None, "these boxes have points"
            entry["keypoints"] = {
                name: [round(float(x), 2), round(float(y), 2), int(v)]
                for name, (x, y, v) in zip(_point_names(result), found[0], strict=True)
            }
    if spread and boxes.spread is not None:
        entry["spread"] = _rounded(boxes.spread[index].ravel(), 2)
    return entry


def _point_names(result: Result) -> tuple[str, ...]:
    """An instruction may give the number of the keypoints alone."""
    instruction = result.instruction
    return instruction.keypoints or tuple(str(number + 1) for number in range(instruction.points))


def polygon_masks(boxes: Boxes, height: int, width: int) -> list[dict[str, Any]]:
    """The masks of polygons as compressed COCO RLE, with the counts as text, as JSON needs them."""
    from visionllm.data.polygons import polygon_rle

    masks = []
    for polygon in () if boxes.points is None else boxes.points:
        rle = polygon_rle(polygon, height, width)
        masks.append({"size": [height, width], "counts": rle["counts"].decode("ascii")})
    return masks


def coco_results(
    result: Result, image_id: int | str, category_ids: Mapping[str, int] | Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """All candidates in COCO's result format of the task: see `Result.to_coco`."""
    if result.task == "captioning":
        return [{"image_id": image_id, "caption": result.text}]
    if result.task == "vqa":
        return [{"image_id": image_id, "question": result.instruction.question, "answer": result.text}]
    ids = _checked_ids(result.classes, category_ids)
    boxes = result.all_boxes
    masks = polygon_masks(boxes, result.height, result.width) if result.task == "segmentation" else None
    keypoints = boxes.keypoints() if result.task == "keypoints" else None
    results = []
    for index, box in enumerate(boxes):
        entry: dict[str, Any] = {"image_id": image_id, "category_id": ids[box.label]}
        # Not bbox too: pycocotools would take its area for the mask's.
        if masks is not None:
            entry["segmentation"] = masks[index]
        elif keypoints is not None:
            entry["keypoints"] = _rounded(keypoints[index].ravel(), 3)
        else:
            x1, y1, x2, y2 = box.xyxy
            entry["bbox"] = _rounded((x1, y1, x2 - x1, y2 - y1), 3)
        results.append({**entry, "score": box.score})
    return results


def _checked_ids(classes: Sequence[str], given: Mapping[str, int] | Sequence[int] | None) -> Sequence[int]:
    if given is None:
        return range(len(classes))
    if isinstance(given, Mapping):
        missing = [name for name in classes if name not in given]
        if missing:
            raise ValueError(f"category_ids: no id for {', '.join(map(repr, missing[:5]))}")
        return [given[name] for name in classes]
    if len(given) != len(classes):
        raise ValueError(f"category_ids: expected {len(classes)} ids, one a class, got {len(given)}")
    return given


def supervision_objects(result: Result) -> Any:
    """`supervision.Detections` or `supervision.KeyPoints` of what is shown: see `Result.to_supervision`."""
    try:
        import supervision
    except ImportError as error:
        raise ImportError("to_supervision needs the package supervision: pip install supervision") from error
    if result.text is not None:
        raise ValueError(f"to_supervision: expected objects, got a result in words ({result.task})")
    boxes = result.boxes
    if result.task == "keypoints":
        found = result.keypoints
        assert found is not None, "the task is keypoints"
        return supervision.KeyPoints(
            xy=found[..., :2],
            class_id=boxes.labels,
            data={"class_name": np.array(boxes.names), "visibility": found[..., 2], "score": boxes.scores},
        )
    masks = None
    if (encoded := result.masks) is not None:
        from visionllm.data.polygons import mask_of

        masks = np.zeros((len(boxes), result.height, result.width), bool)
        for mask, rle in zip(masks, encoded, strict=True):
            mask[:] = mask_of(rle, result.height, result.width)
    return supervision.Detections(
        xyxy=boxes.xyxy,
        mask=masks,
        confidence=boxes.scores,
        class_id=boxes.labels,
        data={"class_name": np.array(boxes.names)},
    )


def _rounded(values: Any, digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]
