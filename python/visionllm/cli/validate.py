"""``visionllm validate``: everything wrong with a COCO-format data set, by file, index and field."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from visionllm.cli.arguments import positive


def main(argv: Sequence[str]) -> int:
    """Returns 0 for a clean data set, 1 for problems."""
    from visionllm.data.validate import IMAGE_CHECKS, validate_coco

    parser = argparse.ArgumentParser(
        prog="visionllm validate", description="Checks a COCO-format data set as training does."
    )
    parser.add_argument("--annotations", required=True, metavar="FILE", help="COCO annotation file")
    parser.add_argument(
        "--images", metavar="DIR", help="folder of the pictures (default: check the file only)"
    )
    parser.add_argument(
        "--check-images",
        choices=IMAGE_CHECKS,
        default="decode",
        help="read pictures to their end, read their sizes, or only look whether they exist (decode)",
    )
    parser.add_argument("--shown", type=positive, default=100, metavar="N", help="problems listed (100)")
    options = parser.parse_args(argv)
    report = validate_coco(options.annotations, options.images, options.check_images)
    for problem in report.problems[: options.shown]:
        print(problem)
    if len(report.problems) > options.shown:
        print(f"... and {len(report.problems) - options.shown} more")
    print(report)
    return 0 if report.ok else 1
