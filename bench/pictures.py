"""The pictures of docs/: what `make demo` leaves, and every task on the first scenes of the validation split.

    make demo
    python bench/pictures.py --demo demo --glyphs glyphs [--model DIR] [--output docs]

None of the scenes is chosen.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

import visionllm
from visionllm.data.sample import Sample
from visionllm.data.scenes import SceneDataset
from visionllm.drawing_text import Line, with_lines_below
from visionllm.evaluate.keypoints import common_names
from visionllm.pipeline import VisionLLM
from visionllm.result import Result

SCENES = 8
COLUMNS = 4
EXPRESSIONS = 4  # of a scene
POINTS = 24  # of an outline
CELL = (320, 280)  # px, the most that a picture of the demo takes
QUALITY = 88


def tiled(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures in rows, each in the middle of its cell."""
    width = max(picture.width for picture in pictures)
    rows = [pictures[first : first + columns] for first in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    canvas = Image.new("RGB", (columns * width, sum(heights)), "white")
    for k, row in enumerate(rows):
        for column, picture in enumerate(row):
            left = column * width + (width - picture.width) // 2
            canvas.paste(picture, (left, sum(heights[:k])))
    return canvas


def demo(folder: Path) -> Image.Image:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))
    return tiled([ImageOps.contain(Image.open(path).convert("RGB"), CELL) for path in files], 3)


def points_of(scene: Sample) -> tuple[str, ...]:
    """The points that all objects of a scene have."""
    return common_names([{"named_keypoints": points} for points in scene.keypoints or ()])


def words(model: VisionLLM, scene: Sample, number: int) -> Image.Image:
    """A long caption and a question; beside a wrong answer, the right one."""
    caption = model.caption(scene.image, "long").text
    question = scene.questions[number % len(scene.questions)]
    said = model.answer(scene.image, question.text).text
    right = "" if said == question.answer else f" (right: {question.answer})"
    lines = [Line(str(caption)), Line(f"– {question.text} {said}{right}")]
    return with_lines_below(Image.fromarray(scene.image), lines)


def tasks(model: VisionLLM, scenes: Sequence[Sample]) -> dict[str, list[Image.Image]]:
    """Pictures of the scenes by task."""

    def plots(results: Sequence[Result]) -> list[Image.Image]:
        return [result.plot() for result in results]

    return {
        "segmentation": plots(
            [model.segment(scene.image, sorted(set(scene.names)), points=POINTS) for scene in scenes]
        ),
        "grounding": plots(
            [
                model.ground(scene.image, [one.text for one in scene.expressions[:EXPRESSIONS]])
                for scene in scenes
            ]
        ),
        "keypoints": plots(
            [model.keypoints(scene.image, sorted(set(scene.names)), points_of(scene)) for scene in scenes]
        ),
        "words": [words(model, scene, number) for number, scene in enumerate(scenes)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, required=True, help="what `make demo` wrote")
    parser.add_argument("--glyphs", type=Path, required=True, help="glyph atlas (visionllm glyphs)")
    parser.add_argument("--model", default="tiny", help="model folder (default: the packaged tiny)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs")
    options = parser.parse_args()
    demo(options.demo).save(options.output / "demo.jpg", quality=QUALITY)
    dataset = SceneDataset("val", glyphs=options.glyphs, keypoints=True, language=True)
    scenes = [dataset[index] for index in range(SCENES)]
    for task, pictures in tasks(visionllm.load(options.model), scenes).items():
        tiled(pictures, COLUMNS).save(options.output / f"tasks_{task}.jpg", quality=QUALITY)


if __name__ == "__main__":
    main()
