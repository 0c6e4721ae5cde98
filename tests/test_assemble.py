"""Published parts, put together: each does in the model folder what it does where it comes from."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from bert_models import bert_folder
from llama_models import hugging_face_llama
from published_detr import DETR, published
from safetensors.torch import load_file, save_file
from small_network import NAMES, TOKENIZER_FILE, train_batch

from visionllm.convert.assemble import Parts, assemble
from visionllm.convert.keys import ConvertError
from visionllm.image import network_batch
from visionllm.instruction import Instruction
from visionllm.model.network import Network
from visionllm.pipeline import VisionLLM
from visionllm.tokenizer import Tokenizer

TOLERANCE = 1e-4  # of logits of about 1, in fp32
CHANGES = {"image_size": 96, "longest_side": 160, "fusion_heads": 2, "base_dtype": "float32", "lora_rank": 2}
PIECES = 2048  # of the tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A detector's, a BERT's and a LLaMA's folders with random weights, and transformers' models of them."""
    root = tmp_path_factory.mktemp("published")
    detector = published(dataclasses.replace(DETR, num_queries=20))
    detector.save_pretrained(root / "detector")
    bert = bert_folder(root / "bert")
    llama = hugging_face_llama(vocab_size=PIECES)
    llama.save_pretrained(root / "llama")
    shutil.copy(TOKENIZER_FILE, root / "llama" / "tokenizer.model")
    return root, detector, bert, llama


def parts_of(root) -> Parts:
    return Parts(str(root / "detector"), text_encoder=str(root / "bert"), llm=str(root / "llama"))


@pytest.fixture(scope="module")
def network(folders, tmp_path_factory):
    output = tmp_path_factory.mktemp("assembled") / "model"
    found = assemble("r50-7b", parts_of(folders[0]), output, changes=CHANGES, queries=12)
    assert found.tensors["adapter, new"] == 2 * 4 * 3  # two halves of q, k, v, o in three layers
    return Network.from_pretrained(output)


@torch.no_grad()
def test_the_llm_gives_its_logits(folders, network):
    _, _, _, llama = folders
    ids = torch.randint(0, PIECES, (2, 11), generator=torch.Generator().manual_seed(0))
    x = network.word_embeddings(ids)
    states, _ = network.llm(x, ids >= 0, x.new_zeros(2, 0, 1, x.shape[-1]))
    found = network.text_head(states, network.embedding.weight)
    assert (found - llama(ids).logits).abs().max() < TOLERANCE


@torch.no_grad()
def test_the_text_encoder_gives_its_states(folders, network):
    _, _, bert, _ = folders
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    assert (network.text_encoder(ids) - bert(ids).last_hidden_state).abs().max() < TOLERANCE


@torch.no_grad()
def test_the_detector_sees_what_it_saw(folders, network):
    """The closed gate keeps the text out; the first 12 of 20 queries are no different with fewer beside them
    in their first layer's input, so that only what does not look at other queries is compared."""
    _, detector, _, _ = folders
    own = network.image_tokenizer
    position, content = detector.model.query_position_embeddings.weight.chunk(2, 1)
    assert torch.equal(own.query_position, position[:12]) and torch.equal(own.query_content, content[:12])
    weight = detector.model.encoder.layers[0].self_attn.value_proj.weight
    assert torch.equal(own.encoder[0].attention.value.weight, weight)
    assert float(own.fusion.gate.detach().abs().max()) == 0


def test_pictures_keep_their_shape(network):
    """Padding changes the group norms' statistics, so only pictures of one shape see what they see alone."""
    random = torch.Generator().manual_seed(0)

    def picture(height: int, width: int):
        return torch.randint(0, 256, (height, width, 3), generator=random, dtype=torch.uint8).numpy()

    model = VisionLLM(network)
    alike, other = [picture(100, 150), picture(100, 150)], picture(200, 110)
    together = model.detect(alike, NAMES, threshold=0.0)
    for one, found in zip(alike, together, strict=True):
        alone = model.detect(one, NAMES, threshold=0.0)
        torch.testing.assert_close(
            torch.tensor(found.boxes.xyxy), torch.tensor(alone.boxes.xyxy), atol=1e-2, rtol=0
        )
    for one, found in zip([*alike, other], model.detect([*alike, other], NAMES, threshold=0.0), strict=True):
        height, width = one.shape[:2]
        assert len(found.boxes.scores) and (found.boxes.xyxy <= [width, height, width, height]).all()
        centres = torch.tensor(found.boxes.centers)
        assert 0 < float(centres.min()) and float(centres.max()) < 1


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        ((1, 96, 161, 3), None, "sides of at most 160"),
        ((1, 96, 160, 1), None, "sides of at most 160"),
        ((1, 96, 160, 3), [[97, 160]], r"sizes must be \[1, 2\] of 1 … \[96, 160\]"),
        ((1, 96, 160, 3), [[96, 160], [96, 160]], r"sizes must be \[1, 2\]"),
    ],
)
def test_pictures_that_are_refused(network, shape, sizes, message):
    images = torch.zeros(shape, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        network.find(
            images, [Instruction(classes=NAMES)], sizes=None if sizes is None else torch.tensor(sizes)
        )


def test_it_trains(network, tmp_path):
    """On pictures that are no squares, without proposals and denoising; every trained part gets gradients."""
    network.save_pretrained(tmp_path)
    network = Network.from_pretrained(tmp_path).train()
    batch = train_batch([[[0.3, 0.3, 0.3, 0.4], [0.7, 0.6, 0.4, 0.5]], [[0.5, 0.5, 0.6, 0.3]]], [[0, 2], [1]])
    images, sizes = network_batch([batch.images[0], batch.images[1][:, :40]], 96, 160)
    batch = dataclasses.replace(batch, images=images, sizes=sizes)
    losses = network.loss(batch)
    losses["total"].backward()
    assert losses["proposals"] == losses["denoising"] == 0
    silent = {
        name.split(".")[0]
        for name, p in network.named_parameters()
        if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all())
    }
    with_gradient = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    for part in (
        *("image_tokenizer.backbone.stages.3", "image_tokenizer.query_content", "llm.layers.0.q.lora_b"),
        *("slot_head", "alignment.decoder", "image_tokenizer.fusion.gate"),
    ):
        assert any(name.startswith(part) for name in with_gradient), (part, silent)


def test_what_is_missing_is_listed_and_nothing_is_written(folders, tmp_path):
    root, *_ = folders
    broken = tmp_path / "llama"
    shutil.copytree(root / "llama", broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.bypass.weight"] = torch.zeros(2, 2)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    parts = dataclasses.replace(parts_of(root), llm=str(broken))
    with pytest.raises(ConvertError, match="1 missing, 1 unused") as error:
        assemble("r50-7b", parts, tmp_path / "model", changes=CHANGES, queries=12)
    assert "llm.layers.1.up.weight" in str(error.value) and "mlp.bypass.weight" in str(error.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (Parts(detector="there", llm="there"), "text encoder"),
        (Parts(text_encoder="there", llm="there"), "a detector or a backbone"),
    ],
)
def test_parts_that_are_needed(parts, message, tmp_path):
    with pytest.raises(ConvertError, match=message):
        assemble("r50-7b", parts, tmp_path)


def test_int8_rows(folders, tmp_path):
    root, *_ = folders
    changes = {**CHANGES, "base_dtype": "int8"}
    assemble("r50-7b", parts_of(root), tmp_path / "model", changes=changes, queries=12)
    network = Network.from_pretrained(tmp_path / "model")
    assert network.llm.layers[0].q.weight.dtype == torch.int8
    found = VisionLLM(network).detect(torch.zeros(96, 96, 3, dtype=torch.uint8).numpy(), NAMES, threshold=0.0)
    assert len(found.boxes.scores)


def test_instructions_are_read_by_both_vocabularies(network):
    prompts = network.tokenizer.prompts([Instruction(classes=NAMES)], 12)
    assert isinstance(network.tokenizer, Tokenizer)
    assert prompts.ids.max() >= PIECES > prompts.names.max()
