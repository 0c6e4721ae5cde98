"""``visionllm validate``: everything wrong with a data set's annotations, by file, index and field."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from visionllm.cli.arguments import positive


def main(argv: Sequence[str]) -> int:
    """Returns 0 for a clean data set, 1 for problems."""
    from visionllm.data.formats import FORMATS
    from visionllm.data.report import IMAGE_CHECKS

    parser = argparse.ArgumentParser(
        prog="visionllm validate",
        description="Checks a data set as training does.",
        epilog="Formats: " + "; ".join(f"{name}: {one.files}" for name, one in FORMATS.items()) + ".",
    )
    parser.add_argument("--annotations", required=True, metavar="FILE", help="annotation file")
    parser.add_argument(
        "--images", metavar="DIR", help="folder of the pictures (default: check the file only)"
    )
    parser.add_argument(
        "--format", choices=tuple(FORMATS), default="coco", help="what the file is, see below (coco)"
    )
    parser.add_argument(
        "--instances", metavar="FILE", help="refcoco: the objects (instances.json beside the annotations)"
    )
    parser.add_argument(
        "--check-images",
        choices=IMAGE_CHECKS,
        default="decode",
        help="read pictures to their end, read their sizes, or only look whether they exist (decode)",
    )
    parser.add_argument(
        "--outlines",
        action="store_true",
        help="coco, lvis: also say how much area is lost where an object's largest part stands for all of it",
    )
    parser.add_argument("--shown", type=positive, default=100, metavar="N", help="problems listed (100)")
    options = parser.parse_args(argv)
    if options.instances and options.format != "refcoco":
        parser.error(f"--instances is for --format refcoco, got --format {options.format}")
    if options.outlines and (options.format not in ("coco", "lvis") or not options.images):
        parser.error("--outlines needs --images and --format coco or lvis")
    chosen = FORMATS[options.format]
    more = {"instances": options.instances} if options.instances else {}
    report = chosen.validate(options.annotations, options.images, check_images=options.check_images, **more)
    for problem in report.problems[: options.shown]:
        print(problem)
    if len(report.problems) > options.shown:
        print(f"... and {len(report.problems) - options.shown} more")
    print(report)
    if options.outlines:
        dataset = chosen.open(options.annotations, options.images, on_error="skip", check_images="none")
        lost, total = dataset.lost_area()
        share = 100 * lost / total if total else 0.0
        print(f"outlines of the largest parts: {share:.2f} % of the objects' area is outside them")
    return 0 if report.ok else 1
