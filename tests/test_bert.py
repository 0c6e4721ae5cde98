"""BERT as text encoder, and published folders of it: transformers' states, every tensor accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published_files import published
from safetensors.torch import load_file, save_file
from small_network import TOKENIZER_FILE
from small_vocabularies import wordpieces
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from visionllm.convert.bert import bert_rules, bert_sizes, read_bert
from visionllm.convert.keys import ConvertError, fill, plan, shapes_of
from visionllm.convert.source import TensorSource
from visionllm.model.bert import Bert
from visionllm.model.text_encoder import mean_pool
from visionllm.tokenizer import PADDING, Tokenizer, pad

SAME = 1e-5  # of values up to 7 in fp32: sums in another order
CONFIG = {
    "vocab_size": 90,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
}


def random_model(kind: type = BertModel, seed: int = 0, **changes: Any) -> Any:
    """With values everywhere, norms and biases too."""
    torch.manual_seed(seed)
    model = kind(BertConfig(**{**CONFIG, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def folder_of(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(wordpieces()) + "\n")
    return folder


def random_ids(sizes: tuple[int, ...] = (40, 7, 1, 23), vocab: int = CONFIG["vocab_size"]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return pad([torch.randint(0, vocab, (n,), generator=generator).tolist() for n in sizes], PADDING)


@torch.no_grad()
def published_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of `BertModel`, with zeros in the padding."""
    states = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long()).last_hidden_state
    return states * (ids >= 0)[..., None]


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForPreTraining])
@torch.no_grad()
def test_hidden_states_are_those_of_transformers(tmp_path, kind):
    model = random_model(kind)
    bert, words = read_bert(folder_of(model, tmp_path))
    ids = random_ids()
    expected = published_states(getattr(model, "bert", model), ids)
    found = bert(ids)
    assert found.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=SAME)
    assert words.vocab_size <= CONFIG["vocab_size"]
    assert not bert.training and next(bert.parameters()).dtype == torch.float32


@torch.no_grad()
def test_minilm_reads_names_as_its_package():
    folder = published("minilm")
    bert, words = read_bert(folder)
    tokenizer = Tokenizer(TOKENIZER_FILE.read_bytes(), words)
    names = ["dog", "a red car", "teddy bear with a hat, in the rain"]
    ids = tokenizer.name_ids(names)
    model = BertModel.from_pretrained(folder).eval()
    expected = published_states(model, ids)
    found = bert(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=SAME)
    # The mean over every token, [CLS] and [SEP] included: as the folder's pooling says.
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] and not pooling["pooling_mode_cls_token"]
    mean = torch.stack([expected[i, : int((ids[i] >= 0).sum())].mean(0) for i in range(3)])
    torch.testing.assert_close(mean_pool(found, ids), mean, rtol=0, atol=SAME)


@torch.no_grad()
def test_texts_do_not_see_their_padding():
    bert = Bert(90, 32, 2, 4, 64).eval()
    ids = random_ids((9, 4))
    found = bert(ids)
    torch.testing.assert_close(found[1, :4], bert(ids[1:, :4])[0], rtol=0, atol=SAME)
    assert (found[1, 4:] == 0).all()
    nothing = bert(torch.full((2, 3), PADDING))
    assert (nothing == 0).all() and nothing.shape == (2, 3, 32)


def test_everything_is_trained():
    bert = Bert(90, 32, 2, 4, 64)
    bert(random_ids((9, 4))).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in bert.named_parameters())


def test_texts_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match="at most 8 tokens a text, got 9"):
        Bert(90, 32, 1, 4, 64, positions=8)(random_ids((9,)))
    with pytest.raises(ValueError, match="multiple of heads, got 32 and 5"):
        Bert(90, 32, 1, 5, 64)


@torch.no_grad()
def test_old_names_of_norms_are_known():
    model = random_model()
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in model.state_dict().items()
    }
    state["embeddings.position_ids"] = torch.arange(40)[None]  # of old files; no floats
    source, bert = TensorSource(state), Bert(90, 48, 3, 4, 80, 40).eval()
    fill(bert, source, plan(source.shapes, shapes_of(bert), bert_rules(), "old"), "old")
    ids = random_ids()
    torch.testing.assert_close(bert(ids), published_states(model, ids), rtol=0, atol=SAME)


def test_names_here_may_stand_behind_a_prefix():
    source = TensorSource(random_model().state_dict())
    target = {f"text_encoder.{name}": shape for name, shape in shapes_of(Bert(90, 48, 3, 4, 80, 40)).items()}
    steps = plan(source.shapes, target, bert_rules("text_encoder."), "prefixed")
    assert {step.target for step in steps} == set(target)


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    """Takes tensors out of the folder's weights, or puts others in."""
    file = folder / "model.safetensors"
    state = {name: value.clone() for name, value in load_file(file).items()}
    for name, value in changes.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    save_file(state, file, metadata={"format": "pt"})


def test_every_tensor_is_accounted_for(tmp_path):
    folder = folder_of(random_model(), tmp_path)
    key, value = "encoder.layer.1.attention.self.key.bias", "encoder.layer.2.attention.self.value.weight"
    change(
        folder, **{key: None, value: torch.zeros(48, 47), "encoder.layer.0.adapter.weight": torch.zeros(3)}
    )
    with pytest.raises(ConvertError) as error:
        read_bert(folder)
    for expected in (
        "1 missing, 1 unused, 1 of another shape",
        "layers.1.key.bias",
        "encoder.layer.0.adapter.weight",
        "layers.2.value.weight: expected shape [48, 48], got [48, 47]",
    ):
        assert expected in str(error.value)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu', got 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ({"is_decoder": True}, "is_decoder must be False, got True"),
        ({"model_type": "roberta"}, "expected \"model_type\" 'bert', got 'roberta'"),
        ({"hidden_size": None}, "expected hidden_size, got none"),
        ({"vocab_size": 20}, "expected shape"),
    ],
)
def test_other_architectures_are_refused(tmp_path, changes, expected):
    folder = folder_of(random_model(), tmp_path)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvertError, match=expected):
        read_bert(folder)


def test_a_vocabulary_larger_than_its_embedding_is_refused(tmp_path):
    folder = folder_of(random_model(), tmp_path)
    (folder / "vocab.txt").write_text("\n".join([*wordpieces(), *map(str, range(100, 200))]))
    with pytest.raises(ConvertError, match="its vocabulary has"):
        read_bert(folder)


def test_sizes_come_from_the_configuration():
    assert bert_sizes(BertConfig().to_dict()) == {
        "vocab_size": 30522, "dim": 768, "layers": 12, "heads": 12, "ffn_dim": 3072, "positions": 512,
        "epsilon": 1e-12,
    }  # fmt: skip
