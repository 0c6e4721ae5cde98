"""``visionllm plan``: the memory of a training run by part, and whether it fits."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from visionllm.cli.arguments import positive

if TYPE_CHECKING:
    from visionllm.train.plan import Plan

BASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}


def main(argv: Sequence[str]) -> int:
    """Prints the table; 0: it fits, 1: it does not, 2: unusable arguments."""
    options = arguments().parse_args(argv)
    from visionllm.model.config import PRESETS
    from visionllm.train.plan import Workload, plan

    config = PRESETS[options.preset]
    if options.base is not None:
        config = replace(config, base_dtype=BASES[options.base])
    height, width = options.image_size or (config.image_size, config.longest_side or config.image_size)
    if config.longest_side == 0 and height != width:
        raise ValueError(f"--image-size: {options.preset} takes squares, got {height}x{width}")
    if config.longest_side == 0:
        config = replace(config, image_size=height)
    parallel = options.parallel or ("fsdp" if options.gpus > 1 else "flat")
    work = Workload(
        batch=options.batch_size,
        height=height,
        width=width,
        **{key: getattr(options, key) for key in WORK if getattr(options, key) is not None},
    )
    result = plan(
        config,
        work,
        gpus=options.gpus,
        parallel=parallel,
        checkpointing=options.checkpointing,
        autocast=options.autocast,
        average=options.average,
        frozen=["image_tokenizer.backbone.*"] if options.stage == 2 else [],
        cuda=not options.cpu,
    )
    memory = options.memory * 1e9
    if options.json:
        more = {"total": result.total, "fits": result.total <= memory}
        print(json.dumps({**asdict(result), **more, "largest_batch": result.largest_batch(memory)}))
    else:
        how = f"{options.gpus} x {options.memory:g} GB, {parallel}"
        how += ", activations checkpointed" if options.checkpointing else ""
        print(f"{options.preset}, {options.batch_size} x {height} x {width} a process, {how}\n")
        print(table(result, memory))
    return 0 if result.total <= memory else 1


WORK = {
    "prefix": "tokens of a prompt, image tokens among them",
    "names": "classes listed in a prompt",
    "known_names": "class names of the training data",
    "groups": "groups of slots",
    "points": "points of a group: 2 for boxes",
}


def arguments() -> argparse.ArgumentParser:
    """The options of ``visionllm plan``."""
    from visionllm.model.config import PRESETS

    parser = argparse.ArgumentParser(
        prog="visionllm plan",
        description="Memory of a training step by part, for one of the processes, without allocating any: "
        "weights, gradients, optimiser state, activations, what collectives need; whether it fits, and the "
        "largest batch that does. Exit code 1: it does not fit.",
        epilog="Example: visionllm plan --preset r50-7b --gpus 8 --memory 80 --checkpointing",
    )
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="of the model")
    parser.add_argument("--gpus", type=positive, default=1, metavar="N", help="processes, one a GPU")
    parser.add_argument("--memory", type=float, default=80.0, metavar="GB", help="of a GPU (10^9 bytes)")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="pictures a micro-batch")
    parser.add_argument(
        "--parallel", choices=("flat", "ddp", "fsdp"), help="fsdp for several GPUs, else flat"
    )
    parser.add_argument("--checkpointing", action="store_true", help="activations are computed again")
    parser.add_argument("--base", choices=BASES, help="type of the LLM's frozen weights; the preset's")
    parser.add_argument("--image-size", type=sides, metavar="N or HxW", help="pixels; the preset's")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1, help="2: the backbone is frozen")
    for key, purpose in WORK.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=positive, metavar="N", help=purpose)
    parser.add_argument("--no-autocast", dest="autocast", action="store_false", help="no bfloat16")
    parser.add_argument("--no-average", dest="average", action="store_false", help="ema_decay=0")
    parser.add_argument("--cpu", action="store_true", help="without what CUDA needs beside the tensors")
    parser.add_argument("--json", action="store_true", help="bytes as JSON")
    return parser


def sides(text: str) -> tuple[int, int]:
    """``800x1333`` or ``224``, for argparse."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if found is None or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"expected pixels, as in 224 or 800x1333, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def table(result: Plan, memory: float) -> str:
    """The plan in GB; ``memory``: bytes of a GPU."""
    rows = [(f"weights, {name}", size) for name, size in sorted(result.weights.items())]
    rows += [
        ("gradients (float32)", result.gradients),
        ("optimiser state (AdamW, float32)", result.optimizer),
        ("average of the weights (float32)", result.average),
        *((f"activations, {name}", size) for name, size in result.activations.items()),
        ("collectives: gathered weights, gradients", result.communication),
        ("CUDA context, gaps between tensors", result.overhead),
    ]
    rows = [(name, size) for name, size in rows if size > 0]
    lines = [f"{name:<42} {size / 1e9:9.3f} GB" for name, size in rows]
    fits = "fits" if result.total <= memory else "does not fit"
    largest = result.largest_batch(memory)
    return "\n".join(
        [
            *lines,
            "-" * 55,
            f"{'together':<42} {result.total / 1e9:9.3f} GB: {fits} {memory / 1e9:g} GB",
            f"{'another picture':<42} {result.per_picture / 1e9:9.3f} GB",
            f"{'largest batch that fits':<42} {largest:9d}",
            f"{'(prediction: keys and values a picture)':<42} {result.cache / 1e9:9.3f} GB",
        ]
    )
