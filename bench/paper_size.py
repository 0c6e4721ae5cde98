"""The paper's model at its full size on a CPU: one prediction and one LoRA training step, by part.

    python bench/paper_size.py [--cases prediction training] [--threads 2] [--height 800 --width 1333]
                               [--layers 32] [--names 80] [--dtype bfloat16] [--trained all]

`r50-7b` with random weights: ResNet-50, BERT-Base, Deformable DETR (6 + 6 layers, 100 queries) in fp32, under
bfloat16 autocast where the CPU multiplies bfloat16, LLaMA-7B in bfloat16 (or int8 rows), through the
operators. It needs 16 GB for a prediction and 19 GB for a training step; fewer layers of the LLM need less.
Weights are copies of one random block: the time of a product does not depend on its numbers, and seven
billion random ones take minutes.

A training step is the losses of one picture, their gradients and AdamW, with the blocks' activations computed
again in the backward pass. Trained are the LoRA adapters and, with `--trained all`, the image tokenizer, the
text encoder and the slots, as in the paper's first stage.

Seconds are wall time inside a part, in the backward pass too where its blocks are (with what they compute
again). Memory is the process's resident set, sampled: "peak" is the most while the part ran, weights and all.
Writes ``bench/results/paper_size.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import write_report
from torch import Tensor, nn

import visionllm
from visionllm.data.train_batch import TrainBatch
from visionllm.image import network_batch
from visionllm.instruction import Instruction
from visionllm.model.config import PRESETS, ModelConfig
from visionllm.model.network import Network
from visionllm.model.weights import NoRandomNumbers
from visionllm.ops.precision import use_autocast
from visionllm.pipeline import VisionLLM
from visionllm.tokenizer import Tokenizer
from visionllm.train.parallel import checkpoint_blocks
from visionllm.words import open_words

TOKENIZER = Path(visionllm.__file__).parent / "weights" / "tiny" / "tokenizer.model"
SAMPLE_SECONDS = 0.02
BLOCK = 1 << 22  # random values that weights are made of
CONSTANT = ("weight", "gate", "weight_scale")  # vectors that do not start at random
OBJECTS = 7  # of the training picture: COCO has 7.3 a picture
# Parts by the modules that they are, in the order of the pass. "slots" are their queries, rows and head.
PARTS = {
    "backbone": ("image_tokenizer.backbone",),
    "text encoder": ("text_encoder",),
    "projections and fusion": ("image_tokenizer.projections.*", "image_tokenizer.fusion"),
    "encoder": ("image_tokenizer.encoder.*",),
    "decoder": ("image_tokenizer.decoder.*",),
    "LLM": ("llm.layers.*",),
}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Meter:
    """Seconds and most bytes by part, of what runs between `start` and `stop` and the hooks' events."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.peak: dict[tuple[str, str], int] = defaultdict(int)
        self._open: list[tuple[tuple[str, str], float]] = []
        self._running = True
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while self._running:
            self._note()
            time.sleep(SAMPLE_SECONDS)

    def _note(self) -> None:
        here = self._open[-1][0] if self._open else ("other", "")
        self.peak[here] = max(self.peak[here], resident())

    def start(self, part: str, way: str) -> None:
        self._open.append(((part, way), time.perf_counter()))

    def stop(self, part: str, way: str) -> None:
        """Closes the innermost of this part; a missing one is no error: first blocks may need no gradient."""
        self._note()
        for i in reversed(range(len(self._open))):
            if self._open[i][0] == (part, way):
                self.seconds[part, way] += time.perf_counter() - self._open[i][1]
                del self._open[i]
                return

    @contextmanager
    def part(self, part: str, way: str = "") -> Iterator[None]:
        self.start(part, way)
        try:
            yield
        finally:
            self.stop(part, way)

    def close(self) -> None:
        self._running = False
        self._thread.join()


def modules_of(network: nn.Module, pattern: str) -> list[nn.Module]:
    name, _, every = pattern.partition(".*")
    module = network.get_submodule(name)
    return list(module.children()) if every or pattern.endswith(".*") else [module]


@contextmanager
def hooked(network: nn.Module, meter: Meter) -> Iterator[None]:
    """Events of every part's modules, forward and backward."""
    handles = []
    for part, patterns in PARTS.items():
        for module in (m for pattern in patterns for m in modules_of(network, pattern)):
            events: dict[str, Callable[..., None]] = {
                "start": lambda *_, part=part: meter.start(part, "forward"),
                "stop": lambda *_, part=part: meter.stop(part, "forward"),
                "back": lambda *_, part=part: meter.start(part, "backward"),
                "done": lambda *_, part=part: meter.stop(part, "backward"),
            }
            handles.append(module.register_forward_pre_hook(events["start"]))
            handles.append(module.register_forward_hook(events["stop"]))
            if isinstance(module, nn.Module) and part in ("encoder", "decoder", "LLM"):
                handles.append(module.register_full_backward_pre_hook(events["back"]))
                handles.append(module.register_full_backward_hook(events["done"]))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Weights of the size that they would start with, from one random block."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    for name, tensor in network.named_parameters():
        if tensor.dtype == torch.int8:
            flat, values = tensor.view(-1), (block.clamp(-3, 3) * 42).to(torch.int8)
        elif name.endswith("bias"):
            tensor.zero_()
            continue
        elif tensor.ndim < 2 and name.endswith(CONSTANT):
            continue
        elif name.endswith("lora_b"):
            tensor.zero_()
            continue
        else:
            scale = 0.5 if "embedding" in name or tensor.ndim < 2 else tensor[0].numel() ** -0.5
            flat, values = (
                tensor.view(-1) if tensor.is_contiguous() else None,
                (block * scale).to(tensor.dtype),
            )
        if flat is None:  # channels last in memory
            tensor.copy_(values[torch.arange(tensor.numel()) % BLOCK].view(tensor.shape))
            continue
        for start in range(0, flat.numel(), BLOCK):
            part = flat[start : start + BLOCK]
            part.copy_(values[: len(part)])


def build(config: ModelConfig) -> Network:
    words = open_words(TOKENIZER)
    with NoRandomNumbers():
        network = Network(config, Tokenizer(words, words))
    fill(network)
    return network


def names(count: int) -> tuple[str, ...]:
    return tuple(f"thing {k}" for k in range(count))


def prediction(network: Network, options: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    model = VisionLLM(network, torch.bfloat16 if reduced() else torch.float32)
    picture = random_picture(options)
    with hooked(network, meter), meter.part("all"):
        result = model.detect(picture, names(options.names), threshold=0.0)
    return {"boxes": len(result.boxes.scores)}  # type: ignore[union-attr]


def reduced() -> bool:
    """Whether what is not the LLM's base is multiplied in bfloat16: where this CPU does so."""
    return use_autocast("auto", torch.device("cpu"))


def random_picture(options: argparse.Namespace) -> np.ndarray:
    size = (options.height, options.width, 3)
    return np.random.default_rng(0).integers(0, 256, size, np.uint8)


def train_batch(network: Network, options: argparse.Namespace) -> TrainBatch:
    random = np.random.default_rng(0)
    images, sizes = network_batch(
        [random_picture(options)], network.config.image_size, network.config.longest_side
    )
    instruction = Instruction(classes=names(options.names))
    boxes = random.uniform(0.2, 0.5, (OBJECTS, 4)).astype(np.float32)
    return TrainBatch(
        images=images,
        sizes=sizes,
        boxes=[boxes],
        labels=[random.integers(0, options.names, OBJECTS)],
        instructions=[dataclasses.replace(instruction, text=instruction.render())],
        ignore=[np.zeros((0, 4), np.float32)],
        unlisted=[np.zeros((0, 4), np.float32)],
        unlisted_names=[[]],
        source=["noise"],
        photo=[True],
    )


def training(network: Network, options: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    network.train()
    for name, parameter in network.named_parameters():
        if name.startswith("llm.") or options.trained == "lora":
            parameter.requires_grad_(".lora_" in name)
    trained = [p for p in network.parameters() if p.requires_grad]
    blocks = checkpoint_blocks(network)
    optimizer = torch.optim.AdamW(network.parameter_groups(1e-4, 1e-5, 1e-4), fused=True)
    batch = train_batch(network, options)
    before = [p.detach().clone() for p in trained[-2:]]
    with hooked(network, meter), meter.part("all"):
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced()):
            losses = network.loss(batch)
        with meter.part("backward"):
            losses["total"].backward()
        with meter.part("optimizer"):
            norm = nn.utils.clip_grad_norm_(trained, 0.1)
            optimizer.step()
    if not torch.isfinite(norm):
        found = [name for name, p in network.named_parameters() if p.grad is not None]
        broken = [name for name in found if not torch.isfinite(network.get_parameter(name).grad).all()]
        raise ValueError(f"training: expected finite gradients, got others in {broken[:10]}")
    assert any(not torch.equal(p, old) for p, old in zip(trained[-2:], before, strict=True))
    return {
        "trained_parameters": sum(p.numel() for p in trained),
        "checkpointed_blocks": blocks,
        "loss": float(losses["total"].detach()),
        "gradient_norm": float(norm),
    }


CASES = {"prediction": prediction, "training": training}


def weights_by_part(network: Network) -> dict[str, dict[str, int]]:
    """Values and bytes of every part's weights; "slots" is what is left."""
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    found: dict[str, dict[str, int]] = {}
    left = set(tensors)
    for part, patterns in PARTS.items():
        prefixes = tuple(pattern.removesuffix(".*") + "." for pattern in patterns)
        mine = {name for name in left if name.startswith(prefixes)}
        if part == "LLM":
            mine |= {name for name in left if name.startswith(("llm.", "embedding.", "text_head."))}
        left -= mine
        found[part] = _size(tensors[name] for name in mine)
    found["slots and queries"] = _size(tensors[name] for name in left)
    return found


def _size(tensors: Iterator[Tensor]) -> dict[str, int]:
    values = list(tensors)
    return {
        "parameters": sum(t.numel() for t in values),
        "bytes": sum(t.numel() * t.element_size() for t in values),
    }


def run(case: str, config: ModelConfig, options: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    network = build(config)
    built = time.perf_counter() - started
    sizes = weights_by_part(network)
    gc.collect()
    loaded = resident()
    meter = Meter()
    try:
        found = CASES[case](network, options, meter)
    finally:
        meter.close()
    rows = []
    for (part, way), seconds in meter.seconds.items():
        if part not in ("all",):
            rows.append(
                {"part": part, "way": way, "seconds": seconds, "peak_bytes": meter.peak.get((part, way), 0)}
            )
    total = meter.seconds["all", ""]
    inside = sum(row["seconds"] for row in rows if row["way"] == "forward" or row["part"] == "optimizer")
    inside += meter.seconds.get(("backward", ""), 0.0)
    return {
        "case": case,
        "seconds": total,
        "seconds_elsewhere": total - inside,
        "peak_bytes": max(meter.peak.values()),
        "loaded_bytes": loaded,
        "build_seconds": built,
        "weights": sizes,
        "parts": rows,
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--layers", type=int, default=32, help="of the LLM; fewer to try it out")
    parser.add_argument("--names", type=int, default=80, help="listed in the prompt")
    parser.add_argument("--dtype", choices=("bfloat16", "int8"), default="bfloat16", help="of the LLM's base")
    parser.add_argument("--trained", choices=("all", "lora"), default="all")
    parser.add_argument("--name", default="paper_size", help="of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = dataclasses.replace(PRESETS["r50-7b"], llm_layers=options.layers, base_dtype=options.dtype)
    rows = []
    for case in options.cases:
        if len(options.cases) > 1 and hasattr(os, "fork"):
            row = _in_a_process(case, config, options)  # memory that one case keeps is not the next one's
        else:
            row = run(case, config, options)
        print_row(row)
        rows.append(row)
    content = {
        "threads": options.threads,
        "picture": [options.height, options.width],
        "names": options.names,
        "llm_layers": options.layers,
        "base_dtype": options.dtype,
        "autocast": reduced(),
        "trained": options.trained,
        "rows": rows,
    }
    print(f"written to {write_report(options.name, content)}")


def _in_a_process(case: str, config: ModelConfig, options: argparse.Namespace) -> dict[str, Any]:
    context = torch.multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, case, config, options))
    process.start()
    sender.close()
    try:
        row = receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{case}: its process ended with {process.exitcode}: no memory left?") from None
    process.join()
    return row


def _send(sender: Any, case: str, config: ModelConfig, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    sender.send(run(case, config, options))


def print_row(row: dict[str, Any]) -> None:
    print(f"{row['case']}: {row['seconds']:.1f} s, peak {row['peak_bytes'] / 1e9:.2f} GB")
    for part in row["parts"]:
        way = f" {part['way']}" if part["way"] else ""
        print(f"  {part['part'] + way:34} {part['seconds']:8.2f} s   peak {part['peak_bytes'] / 1e9:.2f} GB")
    print(f"  {'elsewhere':34} {row['seconds_elsewhere']:8.2f} s")
    for part, size in row["weights"].items():
        print(f"  weights of {part:23} {size['bytes'] / 1e9:8.3f} GB")


if __name__ == "__main__":
    main()
