"""Models of transformers with the compiled operator in place of their own: same outputs, same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from visionllm.ops import MultiScaleDeformableAttention, accelerate_hugging_face

transformers = pytest.importorskip("transformers")


def small_resnet():
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 20],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def deformable_detr() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.DeformableDetrConfig(
        backbone_config=small_resnet(),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=11,
        num_labels=5,
    )
    return transformers.DeformableDetrForObjectDetection(config), {"pixel_values": torch.randn(2, 3, 96, 72)}


def rt_detr() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 20],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[12, 16, 20],
        encoder_hidden_dim=32,
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        feat_strides=[8, 16, 32],
        decoder_in_channels=[32, 32, 32],
        d_model=32,
        decoder_ffn_dim=32,
        decoder_attention_heads=4,
        decoder_layers=2,
        num_queries=11,
        num_denoising=0,
        num_labels=5,
    )
    return transformers.RTDetrForObjectDetection(config), {"pixel_values": torch.randn(2, 3, 96, 96)}


def grounding_dino() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    text = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=small_resnet(),
        text_config=text,
        use_timm_backbone=False,
        backbone=None,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=11,
        max_text_len=8,
    )
    words = torch.tensor([[2, 7, 9, 4, 3], [2, 8, 4, 3, 0]])
    inputs = {
        "pixel_values": torch.randn(2, 3, 96, 72),
        "input_ids": words,
        "attention_mask": (words > 0).long(),
        "token_type_ids": torch.zeros_like(words),
    }
    return transformers.GroundingDinoForObjectDetection(config), inputs


@pytest.mark.parametrize("build", [deformable_detr, rt_detr, grounding_dino])
def test_outputs_and_gradients_stay(build) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    with torch.no_grad():  # sampling offsets start at zero in some of these: move them
        for name, parameter in model.named_parameters():
            if "sampling_offsets" in name or "attention_weights" in name:
                parameter.normal_(std=0.5)
    model.eval()
    accelerated = accelerate_hugging_face(copy.deepcopy(model))
    replaced = [m for m in accelerated.modules() if isinstance(m, MultiScaleDeformableAttention)]
    originals = [m for m in model.modules() if type(m).__name__ == "MultiScaleDeformableAttention"]
    assert len(replaced) == len(originals) >= 2
    assert accelerated.state_dict().keys() == model.state_dict().keys()

    results = []
    for candidate in (model, accelerated):
        output = candidate(**inputs)
        finite = torch.where(output.logits.isfinite(), output.logits, 0.0)  # Grounding DINO pads with -inf
        (finite.square().mean() + output.pred_boxes.square().mean()).backward()
        offsets = [p.grad for n, p in candidate.named_parameters() if "sampling_offsets" in n]
        assert offsets and all(g is not None and g.abs().max() > 0 for g in offsets)
        results.append((output.logits, output.pred_boxes, *offsets))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_second_call_changes_nothing() -> None:
    model = accelerate_hugging_face(deformable_detr()[0])
    modules = list(model.modules())
    assert all(a is b for a, b in zip(accelerate_hugging_face(model).modules(), modules, strict=True))


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no MultiScaleDeformableAttention module"):
        accelerate_hugging_face(nn.Linear(2, 2))


def test_other_modules_of_that_name_are_refused() -> None:
    class Other(nn.Module):
        def forward(self, value, locations):
            return value

    Other.__name__ = "MultiScaleDeformableAttention"
    with pytest.raises(
        ValueError, match=r"takes \(value, locations\); expected \(value, value_spatial_shapes"
    ):
        accelerate_hugging_face(nn.Sequential(Other()))
