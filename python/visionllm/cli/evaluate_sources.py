"""Where ``visionllm evaluate`` takes its pictures from: files, published sets or generated scenes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from visionllm.cli.arguments import positive
from visionllm.cli.evaluate_language import FORMATS
from visionllm.data.scenes import SPLITS

if TYPE_CHECKING:
    from visionllm.data.sample import Sample
    from visionllm.evaluate.samples import Samples, SampleSet

SCENES = 500  # of a split, where --limit does not say
FILES = ("annotations", "refs", "karpathy", "conversations")


def add_sources(parser: argparse.ArgumentParser) -> None:
    """The options; exactly one of --scenes, --annotations (alone), --refs, --karpathy, --conversations."""
    files = parser.add_argument_group("pictures in files")
    files.add_argument("--annotations", type=Path, metavar="FILE", help="COCO annotation file")
    files.add_argument("--images", type=Path, metavar="DIR", help="folder that file names are relative to")
    files.add_argument("--lvis", action="store_true", help="--annotations is LVIS's (see --group-size)")
    files.add_argument(
        "--captions", type=Path, metavar="FILE", help="with --annotations: COCO file of their captions"
    )
    files.add_argument(
        "--refs", type=Path, metavar="FILE", help="RefCOCO references, refs(unc).p or JSON (grounding)"
    )
    files.add_argument(
        "--karpathy", type=Path, metavar="FILE", help="dataset_coco.json of the Karpathy splits (captioning)"
    )
    files.add_argument(
        "--conversations", type=Path, metavar="FILE", help="questions in LLaVA-Instruct's JSON (vqa)"
    )
    files.add_argument("--split", metavar="NAME", help="part of --refs or --karpathy (val; Karpathy: test)")
    scenes = parser.add_argument_group("generated scenes")
    scenes.add_argument("--scenes", choices=SPLITS, help="scenes of this split, made on the way")
    scenes.add_argument("--scene-seed", type=int, default=0, metavar="N", help="other scenes (0)")
    scenes.add_argument(
        "--scene-size", type=positive, metavar="N", help="their side in pixels (what the model sees)"
    )
    scenes.add_argument("--glyphs", type=Path, metavar="DIR", help="glyph atlas (default: plain shapes only)")
    scenes.add_argument("--backgrounds", type=Path, metavar="DIR", help="photos behind some of the scenes")
    scenes.add_argument(
        "--background-annotations", type=Path, metavar="FILE", help="COCO-format JSON of those photos"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help=f"only the first N pictures (scenes: {SCENES})"
    )


def source_problem(options: argparse.Namespace) -> str | None:
    """What is wrong with the choice of sources; None if nothing is."""
    given = [name for name in ("scenes", "refs", "karpathy", "conversations") if getattr(options, name)]
    if not given and options.annotations is not None:
        given = ["annotations"]
    if options.task == FORMATS:
        return f"--task {FORMATS} takes no pictures, got --{given[0]}" if given else None
    if len(given) != 1:
        shown = " and ".join(f"--{name}" for name in given) or "none"
        return f"expected one of --scenes, --{', --'.join(FILES)}, got {shown}"
    if options.lvis and (given[0] != "annotations" or options.task != "detection"):
        return "--lvis belongs to --annotations and --task detection"
    if given[0] != "scenes" and options.images is None:
        return f"--{given[0]} needs --images"
    fits = {"refs": "grounding", "karpathy": "captioning", "conversations": "vqa"}
    if options.task != fits.get(given[0], options.task):
        return f"--{given[0]} belongs to --task {fits[given[0]]}, got {options.task}"
    return None


def described_source(options: argparse.Namespace) -> dict[str, str | int | None]:
    """What the sources' options say, for metrics.json."""
    names = ("annotations", "captions", "refs", "karpathy", "conversations", "split", "scenes", "limit")
    shown = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.scenes:
        shown |= {"scene_seed": options.scene_seed, "scene_size": scene_size(options)}
    return {name: value if isinstance(value, int) else str(value) for name, value in shown.items()}


def scene_size(options: argparse.Namespace) -> int:
    """The side of generated scenes: what was asked for, or what the model sees."""
    if options.scene_size is not None:
        return int(options.scene_size)
    from visionllm.model.config import ModelConfig
    from visionllm.model.weight_files import CONFIG
    from visionllm.model_folder import model_folder

    return ModelConfig.from_json((model_folder(options.model) / CONFIG).read_bytes()).image_size


def open_samples(options: argparse.Namespace) -> SampleSet:
    """The samples of the source, read."""
    from visionllm.evaluate.samples import SampleSet

    return SampleSet(_source(options), options.limit)


def _source(options: argparse.Namespace) -> Samples:
    if options.scenes:
        from visionllm.data.scenes import SceneDataset

        return SceneDataset(
            options.scenes,
            options.scene_seed,
            size=scene_size(options),
            length=options.limit or SCENES,
            glyphs=options.glyphs,
            backgrounds=options.backgrounds,
            background_annotations=options.background_annotations,
            masks=options.task == "segmentation",
            keypoints=options.task == "keypoints",
            language=options.task in ("grounding", "captioning", "vqa"),
        )
    if options.refs:
        from visionllm.data.refcoco import RefCocoDataset

        split = options.split or "val"
        return RefCocoDataset(options.refs, options.images, options.annotations, split, check_images="none")
    if options.karpathy:
        from visionllm.data.karpathy import KarpathyDataset

        return KarpathyDataset(options.karpathy, options.images, options.split or "test")
    if options.conversations:
        from visionllm.data.llava import LlavaDataset

        return LlavaDataset(options.conversations, options.images)
    if options.lvis:
        from visionllm.data.lvis import LvisDataset

        return LvisDataset(options.annotations, options.images, check_images="none")
    from visionllm.data.coco import CocoDataset

    source = CocoDataset(
        options.annotations, options.images, check_images="header", captions=options.captions
    )
    return DerivedExpressions(source) if options.task == "grounding" else source


class DerivedExpressions:
    """COCO-format pictures with expressions made from their annotations (largest, leftmost, ...).

    Samples that have expressions of their own keep these.
    """

    def __init__(self, source: Samples) -> None:
        self._source = source
        self.names = getattr(source, "vocabulary", ())

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        from visionllm.data.expressions import derived_expressions

        sample = self._source[index]
        if not sample.expressions:
            sample.expressions = derived_expressions(sample, np.random.default_rng((0, index)))
        return sample
