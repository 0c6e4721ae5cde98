"""The whole model beside plain torch: one prediction, and one training step.

    python bench/model.py [--threads 1] [--cases prediction training] [--peers eager compile]
                          [--model tiny] [--names 10] [--batch 4] [--repeats 20]

"eager" is the reference path (VISIONLLM_OPS=reference), "compile" torch.compile of its image tokenizer, text
encoder and LLM, which takes one to three minutes to compile for each case: leave it out with `--peers eager`.
A prediction is `detect` of one picture, from the array to the boxes; a training step is the losses of a batch
and their gradients, under bfloat16 autocast where this CPU multiplies bfloat16. "--profile" prints where the
time goes instead, by operator. Writes ``bench/results/model_<threads>_threads.json``.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from harness import Limits, Row, Work, compare, measure_limits, print_rows, write_results
from torch import nn

import visionllm
from visionllm.data.train_batch import TrainBatch
from visionllm.instruction import Instruction
from visionllm.model.network import Network
from visionllm.ops import use_operators
from visionllm.ops.precision import use_autocast
from visionllm.pipeline import VisionLLM

COMPILED = ("image_tokenizer", "text_encoder", "llm")
PEERS = {"visionllm": "kernels", "eager": "reference", "compile": "reference"}
OBJECTS = 4  # a training picture


def names(count: int) -> tuple[str, ...]:
    return tuple(f"thing {k}" for k in range(count))


def train_batch(size: int, count: int, listed: int) -> TrainBatch:
    """Pictures of noise with objects anywhere."""
    random = np.random.default_rng(0)
    instruction = Instruction(classes=names(listed))
    boxes = [random.uniform(0.2, 0.5, (OBJECTS, 4)).astype(np.float32) for _ in range(count)]
    return TrainBatch(
        images=random.integers(0, 256, (count, size, size, 3), np.uint8),
        boxes=boxes,
        labels=[random.integers(0, listed, OBJECTS) for _ in range(count)],
        instructions=[instruction] * count,
        ignore=[np.zeros((0, 4), np.float32)] * count,
        unlisted=[boxes[0][:1] * 0.5] * count,
        unlisted_names=[["truck"]] * count,
        source=["noise"] * count,
        photo=[False] * count,
    )


@contextmanager
def products(network: nn.Module, total: Counter[str]) -> Iterator[None]:
    """Counts operations of linear layers and convolutions, by far the most, and the weights' bytes."""

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        weight = module.weight
        total["flops"] += 2 * output.numel() * weight[0].numel()
        total["bytes"] += weight.numel() * weight.element_size()

    hooks = [
        module.register_forward_hook(count)
        for module in network.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def compiled(network: Network) -> Network:
    for name in COMPILED:
        getattr(network, name).compile(dynamic=False)
    return network


def prediction(network: Network, options: argparse.Namespace) -> Callable[[], object]:
    size = network.config.image_size
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    model = VisionLLM(network)
    return lambda: model.detect(picture, names(options.names))


def training(network: Network, options: argparse.Namespace) -> Callable[[], object]:
    network.train()
    batch = train_batch(network.config.image_size, options.batch, options.names)
    reduced = use_autocast("auto", torch.device("cpu"))

    def step() -> None:
        network.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16) if reduced else nullcontext():
            total = network.loss(batch)["total"]
        total.backward()

    return step


CASES = {"prediction": prediction, "training": training}


def functions(network: Network, case: str, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    for peer in ("visionllm", *options.peers):
        own = copy.deepcopy(network)
        run = CASES[case](compiled(own) if peer == "compile" else own, options)

        def call(run: Callable[[], object] = run, how: str = PEERS[peer]) -> object:
            with use_operators(how):
                return run()

        found[peer] = call
    return found


def work_of(network: Network, case: str, options: argparse.Namespace) -> Work:
    """A training step counts three times its forward pass: an upper bound, for parts of it are frozen."""
    total: Counter[str] = Counter()
    own = copy.deepcopy(network)
    run = CASES[case](own, options)
    with products(own, total), use_operators("reference"):
        run()
    factor = 3 if case == "training" else 1
    return Work(factor * total["bytes"], factor * total["flops"])


def print_profile(function: Callable[[], object], repeats: int) -> None:
    for _ in range(3):
        function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(repeats):
            function()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="packaged weights or a folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peers", nargs="*", choices=("eager", "compile"), default=["eager", "compile"])
    parser.add_argument("--names", type=int, default=10, help="listed in the prompt")
    parser.add_argument("--batch", type=int, default=4, help="pictures of a training step")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="print a profile, compare nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network = visionllm.load(options.model, device="cpu").network
    limits: Limits = measure_limits()
    rows: list[Row] = []
    for case in options.cases:
        peers = functions(network, case, options)
        if options.profile:
            for peer, function in peers.items():
                print(f"{case}, {peer}")
                print_profile(function, options.repeats)
            continue
        repeats = dict.fromkeys(peers, options.repeats)
        label = f"{case} {options.names} names"
        new = compare(label, peers, work_of(network, case, options), limits, repeats)
        print_rows(new)
        rows += new
    if rows:
        name = f"model_{options.threads}_threads"
        print(f"written to {write_results(name, rows, {options.threads: limits})}")


if __name__ == "__main__":
    main()
