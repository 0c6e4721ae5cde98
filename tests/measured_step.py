"""Peak memory of one real training step, for test_plan.py; prints JSON.

    measured_step.py NAME [checkpointing]

Bytes beyond what the process has after a step of a smaller network, when libraries and threads are there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_network import SMALL, TOKENIZER_FILE, train_batch

from visionllm.model.config import ModelConfig
from visionllm.model.network import Network
from visionllm.tokenizer import Tokenizer
from visionllm.train.average import WeightAverage
from visionllm.train.distributed import Processes, SharedGradients
from visionllm.train.parallel import checkpoint_blocks
from visionllm.train.plan import Workload

# Each with its pictures a step.
CONFIGS: dict[str, tuple[ModelConfig, int]] = {
    "tiny": (ModelConfig(), 8),
    # The paper's parts in medium sizes, a frozen bf16 LLM among them.
    "medium": (
        ModelConfig(
            image_size=320,
            backbone="resnet50",
            frozen_stages=1,
            freeze_depthwise=False,
            detector="deformable-detr",
            dim=256,
            encoder_layers=3,
            decoder_layers=3,
            ffn_dim=1024,
            num_queries=50,
            fusion_heads=8,
            llm_dim=768,
            llm_layers=8,
            llm_heads=12,
            llm_kv_heads=12,
            llm_ffn_dim=2048,
            llm_head="linear",
            base_dtype="bfloat16",
            lora_targets=("q", "k", "v", "o"),
            class_rows="static",
        ),
        2,
    ),
}
CLASSES = tuple(f"kind {letter} of thing" for letter in "abcdefghijklmnopqrst")


def batch_of(config: ModelConfig, pictures: int) -> Any:
    """Pictures of noise with eight objects each."""
    random = np.random.default_rng(0)
    batch = train_batch(
        [random.uniform(0.2, 0.6, (8, 4)).tolist() for _ in range(pictures)],
        [random.integers(0, len(CLASSES), 8).tolist() for _ in range(pictures)],
        classes=CLASSES,
    )
    size = (pictures, config.image_size, config.image_size, 3)
    batch.images = random.integers(0, 256, size, dtype=np.uint8)
    return batch


def work_of(config: ModelConfig, pictures: int) -> Workload:
    """What `batch_of` is, for the plan."""
    prompts = Tokenizer.from_file(TOKENIZER_FILE).prompts(
        batch_of(config, pictures).instructions, config.num_queries
    )
    denoising = 8 if config.detector == "two-stage" else 0
    return Workload(
        batch=pictures,
        height=config.image_size,
        width=config.image_size,
        prefix=prompts.ids.shape[1],
        text=prompts.description.shape[1],
        names=prompts.class_mask.shape[1],
        name_tokens=prompts.names.shape[1],
        known_names=1,
        groups=8 + 12 + denoising,
        denoising=denoising,
    )


def step(config: ModelConfig, pictures: int, checkpointing: bool) -> None:
    network = Network(config, Tokenizer.from_file(TOKENIZER_FILE)).train()
    if checkpointing:
        checkpoint_blocks(network)
    gradients = SharedGradients(network, Processes(0, 1, torch.device("cpu")), numbers=1)
    average = WeightAverage(network, 0.999)
    optimizer = torch.optim.AdamW(network.parameter_groups(1e-3, 1e-3, 0.0), fused=True)
    for _ in range(2):  # the optimiser's state is there from the second on
        gradients.zero()
        network.loss(batch_of(config, pictures))["total"].backward()
        optimizer.step()
        average.update()


def status(key: str) -> int:
    """Bytes from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def main(name: str, checkpointing: bool) -> None:
    torch.set_num_threads(1)
    step(SMALL, 2, checkpointing)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    step(*CONFIGS[name], checkpointing)
    print(json.dumps({"peak": status("VmHWM") - before}))


if __name__ == "__main__":
    main(sys.argv[1], "checkpointing" in sys.argv)
