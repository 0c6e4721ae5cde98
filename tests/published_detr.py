"""Deformable DETR of transformers with random weights, and this package's with the same ones."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import torch
from small_network import SMALL
from torch import Tensor, nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

from visionllm.convert import TensorSource, fill, shapes_of
from visionllm.convert.deformable_detr import deformable_detr_steps
from visionllm.model.config import ModelConfig
from visionllm.model.deformable_detr import DeformableDetr
from visionllm.model.resnet import normalised

DETR = dataclasses.replace(
    SMALL, detector="deformable-detr", backbone="resnet50", frozen_stages=1, decoder_layers=3, fusion_gate=0.0
)
TRUE_WIDTHS = dataclasses.replace(DETR, dim=256, heads=8, points=4, ffn_dim=1024, num_queries=84)
# Height and width of what is not padding, in pictures of 96 × 160 pixels.
PADDED = (96, 160)
SIZES = torch.tensor([[96, 160], [70, 101], [33, 160]])


def randomise(module: nn.Module, seed: int) -> None:
    """Moves every weight and statistic, so that none of them can be mistaken for another; in place."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=random)
                if name.endswith(("running_var", "variance")):
                    tensor.copy_(1 + 0.2 * noise.abs())
                elif tensor.ndim == 4:  # convolutions, which keep their input's size
                    tensor.copy_(noise * tensor[0].numel() ** -0.5)
                else:
                    tensor += 0.05 * noise


def published(config: ModelConfig, seed: int = 0, **changes: Any) -> DeformableDetrForObjectDetection:
    """Of a model's sizes. With box refinement every layer has a head of its own."""
    gc.collect()  # layers and their packed weights refer to each other, so the last test's are still there
    sizes = {
        "d_model": config.dim,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_n_points": config.points,
        "decoder_n_points": config.points,
        "encoder_ffn_dim": config.ffn_dim,
        "decoder_ffn_dim": config.ffn_dim,
        "num_queries": config.num_queries,
        "with_box_refine": config.box_refine,
    }
    torch.manual_seed(seed)
    trunk = ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    model = DeformableDetrForObjectDetection(
        DeformableDetrConfig(backbone_config=trunk, **(sizes | changes))
    ).eval()
    randomise(model, seed)
    return model


def converted(config: ModelConfig, model: nn.Module) -> DeformableDetr:
    ours = DeformableDetr(config).eval()
    source = TensorSource(model.state_dict())
    fill(ours, source, deformable_detr_steps(source, shapes_of(ours), "there"), "there")
    return ours


def pictures(sizes: Tensor = SIZES, padded: tuple[int, int] = PADDED, seed: int = 0) -> Tensor:
    """uint8 [B, H, W, 3], with anything in the padding."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (len(sizes), *padded, 3), generator=random, dtype=torch.uint8)


def pixels(images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """pixel_values [B, 3, H, W], padded with zeros, and pixel_mask [B, H, W]."""
    mask = torch.zeros(images.shape[:3], dtype=torch.long)
    for one, (height, width) in zip(mask, sizes.tolist(), strict=True):
        one[:height, :width] = 1
    return normalised(images) * mask[:, None], mask


def text(config: ModelConfig, count: int) -> tuple[Tensor, Tensor]:
    """Features [count, 5, C_text] and their mask, with padding."""
    random = torch.Generator().manual_seed(1)
    features = torch.randn(count, 5, config.text_dim, generator=random)
    return features, torch.arange(5) < torch.arange(1, count + 1)[:, None]
