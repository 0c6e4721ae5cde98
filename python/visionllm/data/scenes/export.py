"""Writing generated scenes as a folder of COCO-format files, and as a contact sheet to look at."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from visionllm.atomic_file import replacing
from visionllm.data.sample import Sample
from visionllm.data.scenes.dataset import SCENE_SIZE, SPLITS, SceneDataset
from visionllm.data.scenes.export_text import SceneText
from visionllm.data.scenes.keypoints import point_names


def write_coco(
    dataset: SceneDataset, output: str | Path, count: int | None = None, image_format: str = "png"
) -> Path:
    """Write the first `count` scenes (default: all) as pictures and annotations.

    Args:
        dataset: made with `masks=True`, so that every annotation gets its segmentation; with `keypoints=True`
            annotations have keypoints, named by their categories; with `language=True` the files of
            `visionllm.data.scenes.export_text` are written too.
        output: gets `images/000000.png`, … and `annotations.json`: images, categories (all `dataset.names`,
            ids from 1), annotations with bbox (x, y, width, height), area, iscrowd and segmentation
            (compressed RLE). Each image also lists in `not_exhaustive` the categories that it may show
            without a box.
        image_format: "png" (exact) or "jpg".

    Returns:
        The path of the annotations.
    """
    if image_format not in ("png", "jpg"):
        raise ValueError(f"image_format must be 'png' or 'jpg', got {image_format!r}")
    if not dataset.with_masks:
        raise ValueError("write_coco: expected a SceneDataset made with masks=True, got masks=False")
    count = len(dataset) if count is None else count
    if not 1 <= count <= len(dataset):
        raise ValueError(f"write_coco: count must be 1 to {len(dataset)}, got {count}")
    output = Path(output)
    (output / "images").mkdir(parents=True, exist_ok=True)
    category = {name: i + 1 for i, name in enumerate(dataset.names)}
    images: list[dict] = []
    annotations: list[dict] = []
    text = SceneText(dataset.split) if dataset.with_language else None
    for index in range(count):
        sample = dataset[index]
        file_name = f"{index:06d}.{image_format}"
        Image.fromarray(sample.image).save(output / "images" / file_name, quality=95)
        listed = set(sample.vocabulary)
        unsure = [category[name] for name in dataset.names if name not in listed]
        height, width = sample.image.shape[:2]
        images.append(
            {
                "id": index + 1,
                "file_name": file_name,
                "width": width,
                "height": height,
                "not_exhaustive": unsure,
            }
        )
        rows = _annotations(sample, index + 1, len(annotations) + 1, category)
        annotations += rows
        if text is not None:
            text.add(sample, images[-1], [row["id"] for row in rows])
    document = {
        "info": {"description": f"generated scenes, split {dataset.split}, seed {dataset.seed}"},
        "images": images,
        "categories": [_category(name, number, dataset) for name, number in category.items()],
        "annotations": annotations,
    }
    path = output / "annotations.json"
    with replacing(path) as part:
        part.write_text(json.dumps(document))
    if text is not None:
        text.write(output)
    return path


def _category(name: str, number: int, dataset: SceneDataset) -> dict:
    category: dict = {"id": number, "name": name}
    if dataset.with_keypoints:
        category |= {"keypoints": list(point_names(name)), "skeleton": []}
    return category


def _annotations(sample: Sample, image_id: int, first_id: int, category: dict[str, int]) -> list[dict]:
    assert sample.masks is not None
    rows = []
    for k, name in enumerate(sample.names):
        x1, y1, x2, y2 = (float(v) for v in sample.boxes[k])
        mask = sample.masks[k]
        rows.append(
            {
                "id": first_id + k,
                "image_id": image_id,
                "category_id": category[name],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": float(sample.area[k]),
                "iscrowd": 0,
                "segmentation": {"size": mask["size"], "counts": mask["counts"].decode("ascii")},
            }
        )
        if sample.keypoints is not None:
            points = [sample.keypoints[k][point] for point in point_names(name)]
            rows[-1]["keypoints"] = [value for point in points for value in point]
            rows[-1]["num_keypoints"] = sum(visible > 0 for *_, visible in points)
    return rows


def contact_sheet(dataset: Sequence[Sample] | SceneDataset, count: int = 24, columns: int = 6) -> Image.Image:
    """The first `count` scenes with their boxes and names, side by side."""
    samples = [dataset[i] for i in range(count)]
    height, width = samples[0].image.shape[:2]
    sheet = Image.new("RGB", (columns * (width + 4), -(-count // columns) * (height + 4)), "white")
    for i, sample in enumerate(samples):
        picture = Image.fromarray(np.ascontiguousarray(sample.image))
        draw = ImageDraw.Draw(picture)
        for box, name in zip(sample.boxes, sample.names, strict=True):
            x1, y1, x2, y2 = (float(v) for v in box)
            draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline="#00e040")
            text = draw.textbbox((x1, max(y1 - 11, 0)), name)
            draw.rectangle(text, fill="#00e040")
            draw.text((x1, max(y1 - 11, 0)), name, fill="black")
        sheet.paste(picture, ((i % columns) * (width + 4), (i // columns) * (height + 4)))
    return sheet


def main(argv: list[str] | None = None) -> int:
    """Command line: write a split as a COCO-format folder."""
    from visionllm.cli.arguments import positive

    parser = argparse.ArgumentParser(
        prog="visionllm scenes", description="Write generated scenes in COCO format."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for images/ and annotations.json")
    parser.add_argument("--count", type=positive, default=100, help="number of scenes")
    parser.add_argument("--split", choices=SPLITS, default="val")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=SCENE_SIZE, help="side of the pictures in pixels")
    parser.add_argument(
        "--glyphs", type=Path, help="glyph atlas (visionllm glyphs); without one: plain shapes only"
    )
    parser.add_argument("--backgrounds", type=Path, help="folder of photos to crop backgrounds from")
    parser.add_argument("--background-annotations", type=Path, help="COCO-format JSON of those photos")
    parser.add_argument("--format", choices=("png", "jpg"), default="png", help="picture format")
    parser.add_argument(
        "--sheet", type=Path, help="also write a contact sheet of the first scenes to this file"
    )
    arguments = parser.parse_args(argv)
    if arguments.split == "heldout_style" and arguments.glyphs is None:
        parser.error("--split heldout_style needs --glyphs: plain shapes have no drawing style")
    dataset = SceneDataset(
        arguments.split,
        arguments.seed,
        arguments.size,
        length=arguments.count,
        glyphs=arguments.glyphs,
        backgrounds=arguments.backgrounds,
        background_annotations=arguments.background_annotations,
        masks=True,
        keypoints=True,
        language=True,
    )
    path = write_coco(dataset, arguments.output, image_format=arguments.format)
    if arguments.sheet is not None:
        contact_sheet(dataset, min(24, arguments.count)).save(arguments.sheet)
    print(f"{arguments.count} scenes, {len(dataset.names)} classes: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
