"""The packaged model on one CPU core: loading, and one picture of 640 x 480 pixels from array to result.

    python bench/latency.py [--model DIR] [--classes 10 80] [--repeats 20]

Loading is timed in a new process, after `import visionllm` and torch. Writes ``bench/results/latency.json``,
or ``latency_NAME.json`` for another model than `tiny`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from harness import report_of, write_report

import visionllm

LOAD = (
    "import sys, time, torch, visionllm; visionllm.load; t = time.perf_counter(); "
    "visionllm.load(sys.argv[1]); print(time.perf_counter() - t)"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument(
        "--classes", type=int, nargs="+", default=[10, 80, 320], help="names listed in a prompt"
    )
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loads = [
        float(
            subprocess.run(
                [sys.executable, "-c", LOAD, options.model], capture_output=True, check=True
            ).stdout
        )
        for _ in range(3)
    ]
    model = visionllm.load(options.model)
    size = model.network.config.image_size
    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    content: dict[str, object] = {"threads": 1, "image_size": size, "load_seconds": statistics.median(loads)}
    print(f"loading {1e3 * statistics.median(loads):.0f} ms")
    known, others = (
        model.network.config.classifier_names,
        [f"thing {k}" for k in range(max(10, *options.classes))],
    )
    # Names that the photo classifier knows first: then it has work to do.
    prompts = {f"{count}_classes": [*known, *others][:count] for count in options.classes}
    prompts["10_other_classes"] = others[:10]
    for what, names in prompts.items():
        model.detect(picture, names)
        times = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            model.detect(picture, names)
            times.append(time.perf_counter() - start)
        content[f"predict_seconds_{what}"] = {"median": statistics.median(times), "fastest": min(times)}
        median, fastest = 1e3 * statistics.median(times), 1e3 * min(times)
        print(f"one picture, {what.replace('_', ' ')}: {median:.0f} ms (fastest {fastest:.0f})")
    print(f"written to {write_report(report_of('latency', options.model), content)}")


if __name__ == "__main__":
    main()
