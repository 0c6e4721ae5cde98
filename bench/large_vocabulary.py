"""1203 names in 16 groups: what the groups share computed once, beside asking group by group.

    python bench/large_vocabulary.py [--names FILE] [--model DIR] [--pictures 1] [--repeats 5]

Three ways for the same names and pictures, one thread, from pixels to the best 300 boxes: `Network.find` for
one group after the other, `visionllm.model.groups.find_groups`, and the same where the names were read for an
earlier picture. --names is an annotation file whose categories give the names, such as LVIS's; without it
they are numbered. Writes ``bench/results/large_vocabulary.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import write_report

import visionllm
from visionllm.evaluate.large_vocabulary import GROUP_SIZE, MAX_BOXES, detect_in_groups, grouped_names
from visionllm.instruction import Instruction
from visionllm.model.groups import read_names

NAMES = 1203  # LVIS v1


def vocabulary(file: Path | None) -> list[str]:
    """The first NAMES names of a file's categories, or numbered ones."""
    if file is None:
        return [f"thing {number}" for number in range(NAMES)]
    categories = json.loads(file.read_text())["categories"]
    return [category["name"].replace("_", " ") for category in categories][:NAMES]


def timed(function: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each call after a first one."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--names", type=Path, help="annotation file whose categories are the names")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--group-size", type=int, default=GROUP_SIZE)
    parser.add_argument("--pictures", type=int, default=1, help="in one pass")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = visionllm.load(options.model).network
    names = vocabulary(options.names)
    groups = [Instruction(classes=tuple(group)) for group in grouped_names(names, options.group_size)]
    size = network.config.image_size
    shape = (options.pictures, size, size, 3)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))

    read = read_names(network, groups)

    def in_turn() -> None:
        for group in groups:
            network.find(images, [group] * len(images), top=MAX_BOXES)

    ways: dict[str, Callable[[], object]] = {
        "group by group": in_turn,
        "shared parts once": lambda: detect_in_groups(network, images, groups),
        "names read before": lambda: detect_in_groups(network, images, read),
    }
    rows: list[dict[str, object]] = []
    medians: dict[str, float] = {}
    for name, function in ways.items():
        seconds = timed(function, options.repeats)
        medians[name] = statistics.median(seconds)
        ratio = medians["group by group"] / medians[name]
        rows.append(
            {
                "name": name,
                "seconds": medians[name],
                "fastest": min(seconds),
                "slowest": max(seconds),
                "times_as_fast": ratio,
            }
        )
        print(f"{name:<20} {1e3 * medians[name]:8.1f} ms  {ratio:.2f} x as fast")
    content = {
        "threads": 1,
        "names": len(names),
        "groups": len(groups),
        "pictures": options.pictures,
        "image_size": size,
        "rows": rows,
    }
    print(f"written to {write_report('large_vocabulary', content)}")


if __name__ == "__main__":
    main()
