"""The published detector's layers here: padding, gradients, precision, and what it refuses.

That it computes what is published stands in test_convert_deformable_detr.py.
"""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from published_detr import DETR, PADDED, SIZES, pictures, randomise, text

from visionllm.model.deformable_detr import DeformableDetr, scales_of
from visionllm.model.image_tokenizer import DenoisingQueries
from visionllm.ops import use_operators

# Gradients through all of the trunk take most of the time of these tests: small pictures for them, though
# with several positions in each scale, or the group norm leaves nothing of the coarsest.
SMALL_SIZES = torch.tensor([[96, 96], [60, 77]])


def detector(**changes):
    gc.collect()  # layers and their packed weights refer to each other, so the last test's are still there
    torch.manual_seed(0)
    model = DeformableDetr(dataclasses.replace(DETR, **changes)).eval()
    randomise(model, 0)
    return model


def see(model, images, sizes=None, gate=None):
    if gate is not None:
        with torch.no_grad():
            model.fusion.gate.fill_(gate)
    return model(images, *text(DETR, len(images)), sizes=sizes)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 100), (65, 31), (1, 1)])
@pytest.mark.parametrize("refine", [False, True])
def test_shapes(height, width, refine):
    model = detector(box_refine=refine)
    tokens = see(model, pictures(torch.zeros(2, 2), (height, width)))
    positions = sum(-(-height // stride) * -(-width // stride) for stride in (8, 16, 32, 64))
    m, layers = DETR.num_queries, DETR.decoder_layers
    assert tokens.features.shape == (2, m, DETR.dim) and torch.isfinite(tokens.features).all()
    assert [boxes.shape for boxes in tokens.boxes] == [(2, m, 4)] * layers
    assert [logits.shape for logits in tokens.objectness] == [(2, m)] * layers
    assert tokens.memory.shape == (2, positions, DETR.dim)
    assert tokens.proposal_boxes is None and tokens.proposal_objectness is None and tokens.drawing is None
    for boxes in tokens.boxes:
        assert boxes.min() > 0 and boxes.max() < 1


@torch.no_grad()
@pytest.mark.parametrize("operators", ["kernels", "reference"])
def test_nothing_of_the_padding_is_seen(operators):
    model, images = detector(), pictures()
    changed = images.clone()
    for one, (height, width) in zip(changed, SIZES.tolist(), strict=True):
        one[height:] = 255
        one[:, width:] = 0
    assert not torch.equal(images, changed)
    with use_operators(operators):
        first, second = (see(model, batch, SIZES, gate=0.5) for batch in (images, changed))
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.memory, second.memory)
    assert torch.equal(first.boxes[-1], second.boxes[-1])


@torch.no_grad()
def test_memory_is_zero_in_the_padding():
    tokens = see(detector(), pictures(), SIZES)
    shapes = [(-(-PADDED[0] // s), -(-PADDED[1] // s)) for s in (8, 16, 32, 64)]
    padding = scales_of(shapes, DETR.dim, SIZES.device, SIZES, PADDED).padding
    assert padding.any(1).tolist() == [False, True, True]
    assert not tokens.memory[padding].any() and tokens.memory[~padding].all(-1).any()


@torch.no_grad()
def test_sizes_of_whole_pictures_change_nothing():
    model, images = detector(), pictures()
    first = see(model, images)
    second = see(model, images, torch.tensor([PADDED] * len(images)))
    torch.testing.assert_close(first.features, second.features, atol=1e-5, rtol=0)
    torch.testing.assert_close(first.boxes[-1], second.boxes[-1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_pictures_of_a_batch_do_not_mix():
    model, images = detector(), pictures()
    together = see(model, images, SIZES, gate=0.0)
    alone = see(model, images[1:2], SIZES[1:2])
    torch.testing.assert_close(together.features[1:2], alone.features, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.of(torch.tensor([1])).boxes[-1], alone.boxes[-1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_gate_opens_to_the_text():
    model, images = detector(), pictures()
    features, mask = text(DETR, len(images))
    for gate, changes in ((0.0, False), (0.5, True)):
        model.fusion.gate.fill_(gate)
        first, second = (model(images, t, mask) for t in (features, features.flip(-1)))
        assert torch.equal(first.features, second.features) != changes
        hidden = features.masked_fill(~mask[..., None], 9.0)  # no token stands there
        torch.testing.assert_close(model(images, hidden, mask).features, first.features)
    blind = detector(text_guidance=False)
    assert torch.equal(
        blind(images, features, mask).features, blind(images, features.flip(-1), mask).features
    )


def gradients(refine, operators):
    model = detector(box_refine=refine)
    with use_operators(operators):
        tokens = see(model, pictures(SMALL_SIZES, (96, 96)), SMALL_SIZES, gate=0.5)
        loss = tokens.features.square().mean() + sum(
            boxes.square().mean() + logits.mean()
            for boxes, logits in zip(tokens.boxes, tokens.objectness, strict=True)
        )
        loss.backward()
    return model, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("refine", [False, True])
def test_gradients_reach_all_that_is_trained(refine):
    model, grads = gradients(refine, "kernels")
    for name, parameter in model.named_parameters():
        trained = not name.startswith(("backbone.stem.", "backbone.stages.0."))
        assert parameter.requires_grad == trained
        assert (grads[name] is not None) == trained, name
    _, expected = gradients(refine, "reference")
    for name, grad in grads.items():
        if grad is None:
            continue
        # Nothing but rounding: a key's bias moves no softmax, and one before a norm of one channel nothing.
        nothing = name.endswith(".key.bias") or (name.startswith("projections.") and name.endswith("0.bias"))
        size, difference = expected[name].norm().item(), (grad - expected[name]).norm().item()
        assert size > 1e-4 or nothing, name
        # By the norm: rounding moves some value across ReLU's kink, which moves gradients before it.
        assert difference < 0.01 * size + 1e-5, f"{name}: {difference} of {size}"


@pytest.mark.parametrize("operators", ["kernels", "reference"])
@pytest.mark.parametrize("train", [False, True])
def test_bfloat16_autocast(operators, train):
    model, images = detector(), pictures()
    with torch.set_grad_enabled(train), use_operators(operators):
        expected = see(model, images, SIZES, gate=0.5)
        with torch.autocast("cpu", torch.bfloat16):
            found = see(model, images, SIZES)
        if train:
            (found.features.sum() + found.boxes[-1].sum()).backward()
            assert torch.isfinite(model.backbone.stages[1][0].reduce.weight.grad).all()
    assert found.boxes[-1].dtype == found.objectness[-1].dtype == torch.float32
    # 8 bits of precision through 49 convolutions and 4 layers with features of size 1.
    assert (found.features - expected.features).abs().mean() < 0.05
    assert (found.boxes[-1] - expected.boxes[-1]).abs().max() < 0.05


def test_on_the_device_meta():
    with torch.device("meta"):
        model = DeformableDetr(DETR)
    expected = DeformableDetr(DETR).state_dict()
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    with torch.no_grad():
        model.to_empty(device="cpu").load_state_dict(expected)
        tokens = see(model.eval(), pictures(SMALL_SIZES, (96, 96)), SMALL_SIZES)
    assert torch.isfinite(tokens.features).all()  # nothing but the state was lost


def test_what_it_starts_with():
    model = DeformableDetr(dataclasses.replace(DETR, box_refine=True))
    assert model.objectness[2].bias.sigmoid().item() == pytest.approx(0.01)
    assert model.box[0][4].bias.tolist() == [0, 0, -2, -2] and not model.box[1][4].bias.any()


def test_what_it_refuses():
    images, denoising = pictures(SMALL_SIZES, (96, 96)), DenoisingQueries(torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="DeformableDetr: denoising must be None"):
        detector()(images, *text(DETR, 2), denoising)
    with pytest.raises(ValueError, match="DeformableDetr: dim must be a multiple of 32, got 48"):
        DeformableDetr(dataclasses.replace(DETR, dim=48))
