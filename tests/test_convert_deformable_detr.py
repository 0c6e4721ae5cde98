"""Deformable DETR of transformers with random weights: here the same encoder output, queries and boxes."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from published_detr import (
    DETR,
    PADDED,
    SIZES,
    TRUE_WIDTHS,
    converted,
    pictures,
    pixels,
    published,
    text,
)
from transformers.models.deformable_detr.modeling_deformable_detr import inverse_sigmoid

from visionllm.convert import ConvertError, TensorSource, fill, open_source, read_config, shapes_of
from visionllm.convert.deformable_detr import check_config, config_fields, deformable_detr_steps
from visionllm.model.config import ModelConfig
from visionllm.model.deformable_detr import DeformableDetr, scales_of
from visionllm.ops import use_operators

TOLERANCE = 1e-4  # of normalised features and of boxes: fp32 sums in another order, through all layers
REFINED = dataclasses.replace(DETR, box_refine=True)


def steps(source, config=DETR, **options):
    with torch.device("meta"):
        target = shapes_of(DeformableDetr(config))
    return deformable_detr_steps(source, target, "there", **options)


@pytest.fixture(scope="module")
def weights():
    """Of transformers' own names in memory: `mlp.fc1`, `o_proj`, and heads once per layer."""
    return published(DETR).state_dict()


@torch.no_grad()
@pytest.mark.parametrize("operators", ["kernels", "reference"])
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "config", [DETR, REFINED, TRUE_WIDTHS], ids=["shared head", "box refinement", "true widths"]
)
def test_equal_outputs(config, padding, operators):
    theirs = published(config)
    ours = converted(config, theirs)
    sizes = SIZES if padding else torch.tensor([PADDED])
    images = pictures(sizes)
    values, mask = pixels(images, sizes)
    expected = theirs(pixel_values=values, pixel_mask=mask)
    layers: list[torch.Tensor] = []
    for layer in ours.decoder:
        layer.register_forward_hook(lambda module, inputs, output: layers.append(output))
    with use_operators(operators):
        tokens = ours(images, *text(config, len(images)), sizes=sizes if padding else None)

    shapes = [(-(-PADDED[0] // s), -(-PADDED[1] // s)) for s in (8, 16, 32, 64)]
    scales = scales_of(shapes, config.dim, sizes.device, sizes, PADDED)
    assert scales.padding.any() == padding
    seen = ~scales.padding
    assert expected.encoder_last_hidden_state[seen].std() > 0.3
    torch.testing.assert_close(
        tokens.memory[seen], expected.encoder_last_hidden_state[seen], atol=TOLERANCE, rtol=0
    )
    hidden, reference = expected.intermediate_hidden_states, expected.init_reference_points
    torch.testing.assert_close(torch.stack(layers, 1), hidden, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(tokens.features, hidden[:, -1], atol=TOLERANCE, rtol=0)
    for i, boxes in enumerate(tokens.boxes):
        change = theirs.bbox_embed[i](hidden[:, i])
        change[..., : reference.shape[-1]] += inverse_sigmoid(reference)
        torch.testing.assert_close(boxes, change.sigmoid(), atol=TOLERANCE, rtol=0)
        reference = expected.intermediate_reference_points[:, i]
    torch.testing.assert_close(tokens.boxes[-1], expected.pred_boxes, atol=TOLERANCE, rtol=0)
    assert (tokens.boxes[0] - tokens.boxes[-1]).abs().max() > 0.01


@pytest.mark.parametrize("config", [DETR, REFINED], ids=["shared head", "box refinement"])
def test_a_saved_folder(tmp_path, config):
    """As save_pretrained writes it: older names, and each box head once."""
    theirs = published(config)
    theirs.save_pretrained(tmp_path)
    values = read_config(tmp_path, ("deformable_detr",))
    check_config(values, config, "there")
    assert dataclasses.replace(config, **config_fields(values)) == config
    source = open_source(tmp_path)
    assert any(".fc1." in name and "mlp" not in name for name in source.shapes)
    with torch.device("meta"):
        ours = DeformableDetr(config)
    fill(ours, source, steps(source, config), str(tmp_path))
    expected = converted(config, theirs).state_dict()
    for name, tensor in ours.state_dict().items():
        if name.startswith(("fusion.", "objectness.")):
            assert tensor.is_meta  # nothing published fills these
        else:
            assert torch.equal(tensor, expected[name]), name


def test_what_is_not_published_starts_at_its_prior(weights):
    source, ours = TensorSource(weights), DeformableDetr(DETR)
    fill(ours, source, steps(source), "there")
    assert not ours.fusion.gate.any()
    assert ours.objectness[0].bias.sigmoid().item() == pytest.approx(0.01)


def timm_names(tensors):
    """The trunk's names as in SenseTime/deformable-detr, which has timm's."""
    inside = {"0": "1", "1": "2", "2": "3"}
    renamed = {}
    for name, tensor in tensors.items():
        head, found, rest = name.partition("backbone.model.")
        if not found:
            renamed[name.replace(".mlp.", ".").replace("o_proj", "out_proj")] = tensor
            continue
        parts = rest.split(".")
        norm = "normalization" in parts
        if parts[0] == "embedder":
            own = "bn1" if norm else "conv1"
        elif "shortcut" in parts:
            own = f"layer{int(parts[2]) + 1}.{parts[4]}.downsample.{int(norm)}"
        else:
            own = f"layer{int(parts[2]) + 1}.{parts[4]}.{'bn' if norm else 'conv'}{inside[parts[6]]}"
        renamed[f"{head}backbone.conv_encoder.model.{own}.{parts[-1]}"] = tensor
    return renamed


def test_the_names_of_timms_trunk(weights):
    renamed = timm_names(weights)
    assert "model.backbone.conv_encoder.model.layer4.2.bn3.running_var" in renamed
    assert "model.decoder.layers.0.self_attn.out_proj.weight" in renamed
    source, other = TensorSource(renamed), TensorSource(weights)
    ours = {step.target: source.read(step.source) for step in steps(source)}
    expected = {step.target: other.read(step.source) for step in steps(other)}
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_every_difference_is_listed(weights):
    tensors = dict(weights)
    tensors["model.enc_output.weight"] = torch.zeros(32, 32)  # of a two-stage model
    tensors["model.level_embed"] = torch.zeros(3, 32)
    del tensors["model.encoder.layers.0.mlp.fc1.bias"]
    del tensors["model.backbone.model.embedder.embedder.normalization.running_var"]
    with pytest.raises(ConvertError) as caught:
        steps(TensorSource(tensors))
    lines = str(caught.value).splitlines()
    assert lines[0] == "there: 2 missing, 1 unused, 1 of another shape"
    assert {"  encoder.0.ffn.up.bias", "  backbone.stem.variance", "  model.enc_output.weight"} < set(lines)
    assert "  model.level_embed → level: expected shape [4, 32], got [3, 32]" in lines


def test_no_name_may_go(weights):
    """Each tensor of the source is needed, but for the categories' rows and the heads' copies."""
    target = shapes_of(DeformableDetr(DETR))
    for name in list(weights)[::5]:
        without = TensorSource({other: tensor for other, tensor in weights.items() if other != name})
        try:
            deformable_detr_steps(without, target, "there")
        except ConvertError as error:
            assert str(error).startswith("there: ") and " missing" in str(error), name
        else:
            assert "class_embed" in name or "bbox_embed" in name, name
    only = {n: t for n, t in weights.items() if "bbox_embed" not in n}
    with pytest.raises(ConvertError, match="6 missing"):
        steps(TensorSource(only))


def test_copies_of_a_head_must_be_equal(weights):
    name = "bbox_embed.2.layers.1.weight"
    tensors = weights | {name: weights[name] + 1}
    message = f"there: expected {name} to be equal to bbox_embed.0.layers.1.weight: without box refinement"
    with pytest.raises(ConvertError, match=message):
        steps(TensorSource(tensors))
    refined = published(REFINED).state_dict()
    name = "model.decoder.bbox_embed.1.layers.0.bias"
    assert name in refined
    with pytest.raises(ConvertError, match=f"{name} to be equal to bbox_embed.1.layers.0.bias: the same"):
        steps(TensorSource(refined | {name: refined[name] + 1}), REFINED)
    with pytest.raises(ConvertError, match="without box refinement all layers share a head"):
        steps(TensorSource(refined), DETR)
    with pytest.raises(ConvertError, match="missing"):  # of one head, those of the other layers
        steps(TensorSource({n: t for n, t in weights.items() if "bbox_embed.1" not in n}), REFINED)


def test_the_first_queries(weights):
    fewer = dataclasses.replace(DETR, num_queries=5)
    source = TensorSource(weights)
    name = "model.query_position_embeddings.weight"
    with pytest.raises(ConvertError, match=r"query_position: expected shape \[5, 32\], got \[12, 32\]"):
        steps(source, fewer)
    ours = DeformableDetr(fewer)
    fill(ours, source, steps(source, fewer, first_queries=True), "there")
    assert torch.equal(torch.cat([ours.query_position, ours.query_content], 1), weights[name][:5])
    more = dataclasses.replace(DETR, num_queries=13)
    with pytest.raises(ConvertError, match="2 of another shape"):
        steps(source, more, first_queries=True)


def changed(values, **changes):
    return copy.deepcopy(values) | changes


def test_config_is_compared():
    trunk = {"model_type": "timm_backbone", "backbone": "resnet50", "out_indices": [2, 3, 4]}
    published_config = {"model_type": "deformable_detr", "num_queries": 300, "backbone_config": trunk}
    paper = dataclasses.replace(
        TRUE_WIDTHS, encoder_layers=6, decoder_layers=6, num_queries=300, image_size=256
    )
    check_config(published_config, paper, "there")
    check_config({"backbone": "resnet50", "backbone_config": None}, paper, "there")
    check_config({"backbone_config": {"model_type": "resnet"}}, paper, "there")
    fewer = dataclasses.replace(paper, num_queries=100)
    check_config(published_config, fewer, "there", first_queries=True)
    for values, config, message in (
        (published_config, fewer, "num_queries: expected 100, got 300"),
        (changed(published_config, two_stage=True), paper, "two_stage: expected False, got True"),
        (changed(published_config, dilation=True), paper, "dilation: expected False, got True"),
        (changed(published_config, with_box_refine=True), paper, "with_box_refine: expected False"),
        (changed(published_config, decoder_n_points=8), paper, "decoder_n_points: expected 4, got 8"),
        (changed(published_config, backbone_config=trunk | {"backbone": "resnet101"}), paper, "'resnet101'"),
        (
            {"backbone_config": {"model_type": "resnet", "depths": [3, 4, 23, 3]}},
            paper,
            r"backbone_config.depths: expected \[3, 4, 6, 3\], got \[3, 4, 23, 3\]",
        ),
        (published_config, ModelConfig(), "detector: expected 'deformable-detr' here, got 'two-stage'"),
    ):
        with pytest.raises(ConvertError, match=message):
            check_config(json.loads(json.dumps(values)), config, "there")
