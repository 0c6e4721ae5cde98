"""Vocabularies from published files: the same ids as their own packages give, and prompts in two of them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from published_files import published
from small_network import TOKENIZER_FILE
from small_vocabularies import SENTENCES, byte_level, json_like_llama, sentencepiece_like_llama, wordpieces
from tokenizers import decoders, models, pre_tokenizers

from visionllm.convert.gguf_file import GGUFFile
from visionllm.instruction import Instruction, parse
from visionllm.model.slots import class_token_embedding
from visionllm.tokenizer import (
    IMAGE,
    MAX_DESCRIPTION_TOKENS,
    MAX_NAME_TOKENS,
    PADDING,
    Tokenizer,
    train_sentencepiece,
)
from visionllm.words import SentencePieceWords, open_words
from visionllm.words.gguf_words import byte_level_json, gguf_words
from visionllm.words.json_words import JsonWords, wordpiece_json

M = 3
PROMPT = 'The image is: <image>. Find {"dog": <c0>, "red car": <c1>} and write (c, x1, y1, x2, y2).'
TEXTS = [
    "",
    "cat",
    " cat",
    "The cat sat on 1024 mats.",
    "a  b",
    "two\nlines\tand a tab",
    "Ærøskøbing, 猫と犬 🦖",
    "<s> is text </s> [SEP] <|im_end|>",
    *SENTENCES[:20],
]


def small_bert(**changes: Any) -> JsonWords:
    return JsonWords(wordpiece_json(wordpieces(), **changes))


def two_vocabularies() -> Tokenizer:
    return Tokenizer(JsonWords(byte_level().to_str().encode(), "<|start|>", "<|end|>"), small_bert())


def listed(row: torch.Tensor) -> list[int]:
    return [i for i in row.tolist() if i != PADDING]


# SentencePiece


@pytest.fixture(scope="module", params=["trained here", "mistral"])
def llama(request: pytest.FixtureRequest) -> bytes:
    if request.param == "mistral":
        return published("mistral").read_bytes()
    return sentencepiece_like_llama()


def test_texts_are_read_as_sentencepiece_reads_them(llama):
    words = SentencePieceWords(llama)
    official = sentencepiece.SentencePieceProcessor(model_proto=llama)
    assert words.vocab_size == official.vocab_size() and words.has_dummy_prefix
    assert (words.bos, words.eos, words.before, words.after) == (1, 2, (1,), ())
    for text in TEXTS:
        assert list(words.encode_first(text)) == official.encode(text)
        assert words.decode(words.encode_first(text)) == text


def test_parts_joined_are_the_whole_text(llama):
    """Wherever a text is cut between two words: the pieces of LLaMA's begin with the space before a word."""
    words = SentencePieceWords(llama)
    for text in SENTENCES[:30]:
        parts = text.replace("  ", " ").split(" ")
        whole = words.encode_first(" ".join(parts))
        joined = words.encode_first(parts[0])
        for part in parts[1:]:
            joined += words.encode(" " + part)
        assert joined == whole
        assert words.decode(joined) == " ".join(parts)


def test_a_part_has_no_space_of_its_own(llama):
    words = SentencePieceWords(llama)
    assert words.processor.decode(words.encode_first("a") + words.encode("b")) == "ab"
    assert words.encode("") == words.encode_first("") == ()


def test_control_tokens_are_written_by_name_only_where_that_is_meant(llama):
    words = SentencePieceWords(llama)
    assert not {words.bos, words.eos} & set(words.encode_first("<s>no</s>"))
    assert words.encode_marked("<s>yes</s> and") == (1, *words.encode("yes"), 2, *words.encode(" and"))
    assert words.encode_marked("yes</s>") == (*words.encode_first("yes"), 2)


def test_the_packaged_vocabulary_has_no_rules_of_its_own():
    words = SentencePieceWords(TOKENIZER_FILE.read_bytes())
    assert not words.has_dummy_prefix and words.before == words.after == ()
    for text in TEXTS:
        assert words.encode(text) == words.encode_first(text) == tuple(words.processor.encode(text))


def test_no_begin_and_end_is_refused():
    words = SentencePieceWords(train_sentencepiece(SENTENCES, 400))
    words.bos = None
    with pytest.raises(ValueError, match="bos"):
        Tokenizer(words)


# tokenizer.json


@pytest.mark.parametrize("prefix", [False, True])
def test_byte_level_pieces_are_those_of_the_package(prefix):
    official = byte_level(prefix)
    words = JsonWords(official.to_str().encode(), "<|start|>", "<|end|>")
    assert words.vocab_size == official.get_vocab_size() == 500
    assert (words.bos, words.eos) == (official.token_to_id("<|start|>"), official.token_to_id("<|end|>"))
    assert words.before == words.after == ()
    for text in TEXTS:
        assert list(words.encode_first(text)) == official.encode(text).ids
        assert words.decode(words.encode_first(text)) == official.decode(official.encode(text).ids)
        assert words.decode(words.encode(text)) == text


def test_padding_and_truncation_of_the_file_are_switched_off():
    official = byte_level()
    official.enable_truncation(4)
    official.enable_padding(length=6)
    words = JsonWords(official.to_str().encode())
    assert len(words.encode(SENTENCES[0])) > 6 and len(words.encode("a")) == 1


def test_a_json_like_llamas():
    official = json_like_llama()
    words = JsonWords(official.to_str().encode(), "<s>", "</s>")
    assert words.before == (1,) and words.after == ()
    for text in SENTENCES[:20]:
        assert [*words.before, *words.encode_first(text)] == official.encode(text).ids
        assert words.decode(words.encode_first(text)) == text
    assert words.encode_first("a") == words.encode(" a") != words.encode("a")


def test_metaspace_is_left_out_between_parts():
    official = json_like_llama()
    official.normalizer = None
    official.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    words = JsonWords(official.to_str().encode(), "<s>", "</s>")
    assert words.encode_first("red") == words.encode(" red") != words.encode("red")


def test_typed_control_tokens_are_text():
    official = byte_level()
    words = JsonWords(official.to_str().encode(), "<|start|>", "<|end|>")
    text = "<|start|>user\nWho?<|end|>"
    assert not {words.bos, words.eos} & set(words.encode(text))
    assert list(words.encode_marked(text)) == official.encode(text).ids
    assert words.decode(words.encode_marked(text)) == "user\nWho?"


def test_wordpieces_stand_between_cls_and_sep():
    words = small_bert()
    dog, red, s = (wordpieces().index(piece) for piece in ("dog", "red", "##s"))
    assert words.encode(" Red dogs") == (red, dog, s)
    assert (words.before, words.after) == ((2,), (3,))
    assert (words.bos, words.eos) == (None, None)


def test_wordpieces_are_those_of_transformers(tmp_path):
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(wordpieces()) + "\n")
    official = BertTokenizer(str(tmp_path / "vocab.txt"))
    words = open_words(tmp_path)
    for text in ("Red dogs, (12) {x}", "naïve Dog", "", "unknown ☃ sign"):
        assert [*words.before, *words.encode(text), *words.after] == official(text)["input_ids"]


def test_case_counts_if_the_configuration_says_so(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(wordpieces()))
    assert open_words(tmp_path).encode("Dog") == open_words(tmp_path).encode("dog")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert open_words(tmp_path).encode("Dog") == (1,)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": "no"}')
    with pytest.raises(ValueError, match="do_lower_case"):
        open_words(tmp_path)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"model": 3}', b'\xff{"model": 3}'])
def test_what_is_no_tokenizer_json_is_refused(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(ValueError, match="tokenizer.json"):
        open_words(tmp_path)


def test_names_of_tokens_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(byte_level().to_str().encode())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<bos>", "eos_token": "<|end|>"}')
    with pytest.raises(ValueError, match="'<bos>' is not in the vocabulary"):
        open_words(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    with pytest.raises(ValueError, match="must name a bos and an eos token"):
        Tokenizer(open_words(tmp_path))


@pytest.mark.parametrize("pieces, expected", [(["[UNK]", "[CLS]"], r"\[SEP\]"), (["a", "a"], "twice")])
def test_a_broken_vocab_txt_is_refused(pieces, expected):
    with pytest.raises(ValueError, match=expected):
        wordpiece_json(pieces)


def test_nothing_to_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        open_words(tmp_path)


def test_the_package_is_needed_only_for_its_files():
    code = "import sys, visionllm.tokenizer, visionllm.words; print('tokenizers' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


# GGUF


def metadata_of(model: bytes) -> dict[str, Any]:
    """A SentencePiece model as llama.cpp writes it into a GGUF file."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def kind(i: int) -> int:
        if processor.is_unknown(i):
            return 2
        return 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1

    every = range(processor.vocab_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in every],
        "tokenizer.ggml.scores": np.array([processor.get_score(i) for i in every], np.float32),
        "tokenizer.ggml.token_type": [kind(i) for i in every],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def test_sentencepiece_comes_back_from_gguf(llama):
    words, there = SentencePieceWords(llama), gguf_words(metadata_of(llama))
    assert isinstance(there, SentencePieceWords)
    assert (there.vocab_size, there.bos, there.eos, there.before) == (words.vocab_size, 1, 2, (1,))
    for text in TEXTS:
        assert there.encode(text) == words.encode(text)
        assert there.encode_first(text) == words.encode_first(text)
        assert there.decode(words.encode_first(text)) == text


def byte_level_metadata(**changes: Any) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    official = byte_level()
    described = json.loads(official.to_str())["model"]
    vocab = sorted(described["vocab"], key=described["vocab"].get)
    return official, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(vocab) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in described["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        **changes,
    }


def test_byte_level_pieces_come_back_from_gguf():
    official, metadata = byte_level_metadata()
    words = gguf_words(metadata)
    assert (words.bos, words.eos, words.before) == (1, 0, ())
    for text in TEXTS:
        assert list(words.encode(text)) == official.encode(text).ids or "<|" in text
    assert gguf_words({**metadata, "tokenizer.ggml.add_bos_token": True}).before == (1,)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model must be 'llama' or 'gpt2', got 'bert'"),
        ({"tokenizer.ggml.pre": "dbrx"}, "tokenizer.ggml.pre must be of .*smollm.*, got 'dbrx'"),
        ({"tokenizer.ggml.bos_token_id": 500}, "bos_token_id must be below 500, got 500"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type must have 500 values, got 1"),
        ({"tokenizer.ggml.merges": "a b"}, "merges must be a Sequence, got str"),
        ({"tokenizer.ggml.model": "llama"}, "expected tokenizer.ggml.scores in the metadata, got none"),
    ],
)
def test_metadata_that_do_not_fit_are_named(changes, expected):
    with pytest.raises(ValueError, match=f"x.gguf: .*{expected}"):
        gguf_words(byte_level_metadata(**changes)[1], "x.gguf")


@pytest.mark.parametrize("cut", ["llama-bpe", "qwen2", "smollm"])
def test_every_way_of_cutting_keeps_the_text(cut):
    metadata = byte_level_metadata(**{"tokenizer.ggml.pre": cut})[1]
    words = gguf_words(metadata)
    for text in TEXTS:
        assert words.decode(words.encode(text)) == text


def test_smollm_reads_digits_one_by_one():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = JsonWords(byte_level_json([*alphabet, "12", "Ġ1"], ["1 2", "Ġ 1"], [1] * 258, "smollm"))
    assert len(words.encode("x 12")) == 4


# Published ones


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, tokenizers.Tokenizer]:
    """Ours, and the package's with the rules that transformers gives these pieces and merges."""
    path = published("smollm2")
    metadata = GGUFFile(path).metadata
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    official = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    official.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    official.decoder = decoders.ByteLevel()
    official.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == 3])
    return open_words(path), official


def test_smollm2_reads_as_in_its_package(smollm2):
    words, official = smollm2
    assert words.vocab_size == official.get_vocab_size() == 49152
    assert (words.bos, words.eos, words.before) == (1, 2, ())
    for text in TEXTS:
        if "<|" not in text:
            assert list(words.encode(text)) == official.encode(text).ids
            assert words.decode(words.encode(text)) == text


def test_smollm2_reads_a_conversation_as_in_its_package(smollm2):
    words, official = smollm2
    text = "<|im_start|>user\nWhat is the capital of Denmark?<|im_end|>\n<|im_start|>assistant\n"
    assert list(words.encode_marked(text)) == official.encode(text).ids
    assert words.encode_marked(text)[:2] == (words.bos, *words.encode("user"))


def test_minilm_reads_as_in_transformers():
    from transformers import AutoTokenizer

    folder = published("minilm")
    words, official = open_words(folder), AutoTokenizer.from_pretrained(folder)
    assert words.vocab_size == len(official) == 30522
    for text in TEXTS:
        if "[SEP]" not in text:
            assert [*words.before, *words.encode_first(text), *words.after] == official(text)["input_ids"]
    pieces = JsonWords(wordpiece_json((folder / "vocab.txt").read_text().splitlines()))
    assert all(pieces.encode(text) == words.encode(text) for text in TEXTS)


# Prompts


def test_prompts_in_two_vocabularies():
    tokenizer = two_vocabularies()
    words, text_words = tokenizer.words, tokenizer.text_words
    assert (tokenizer.vocab_size, tokenizer.text_vocab_size) == (500, text_words.vocab_size)
    prompts = tokenizer.prompts([parse(PROMPT)], M)
    # The LLM's side: every id is a word's, a class token's or the picture's.
    parts = ["The image is: ", '. Find {"', '": ', ', "', '": ', "} and write (c, x1, y1, x2, y2)."]
    names = [words.encode(" dog"), words.encode(" red car")]
    c0, c1 = (500,), (501,)
    expected = (
        *words.encode_first(parts[0]), *(IMAGE,) * M, *words.encode(parts[1]), *names[0],
        *words.encode(parts[2]), *c0, *words.encode(parts[3]), *names[1], *words.encode(parts[4]), *c1,
        *words.encode(parts[5]),
    )  # fmt: skip
    assert prompts.ids[0].tolist() == list(expected)
    # The text encoder's.
    between = lambda *ids: [*text_words.before, *ids, *text_words.after]  # noqa: E731
    assert [listed(row) for row in prompts.names] == [
        between(*text_words.encode(name)) for name in ("dog", "red car")
    ]
    around = [text_words.encode(part) for part in (parts[0], parts[1], parts[5])]
    assert prompts.description[0].tolist() == between(*(i for part in around for i in part))
    assert torch.equal(tokenizer.name_ids(["dog", "red car"]), prompts.names)
    assert [tuple(listed(row)) for row in tokenizer.word_ids(["dog", "red car"])] == names
    assert tokenizer.answer_ids("two dogs") == (1, *words.encode("two dogs"), 0)


def test_what_the_text_encoder_reads_ends_with_sep_even_if_cut():
    tokenizer = two_vocabularies()
    long = "very " * 80 + "long name"
    text = PROMPT.replace("The image", "Please " * 800 + "the image").replace("red car", long)
    prompts = tokenizer.prompts([parse(text)], M)
    assert prompts.names.shape[1] == MAX_NAME_TOKENS
    assert prompts.description.shape[1] == MAX_DESCRIPTION_TOKENS
    for row in (prompts.names[1], prompts.description[0]):
        assert (row[0], row[-1]) == (2, 3)


def test_texts_of_llama_stand_behind_bos(llama):
    tokenizer = Tokenizer(llama)
    words = tokenizer.words
    prompts = tokenizer.prompts([parse(PROMPT), parse(PROMPT.removeprefix("The image is: "))], M)
    assert prompts.ids[0, 0] == prompts.ids[1, 0] == words.bos
    assert (prompts.name_index[:, 0] == -1).all()
    assert prompts.ids[0, 1:5].tolist() == list(words.encode_first("The image is: ")[:4])
    assert prompts.ids[1, 1] == IMAGE
    for k, name in enumerate(("dog", "red car")):
        marked = prompts.ids[0][prompts.name_index[0] == k].tolist()
        assert marked == [*words.encode(" " + name), words.vocab_size + k]
    # The text encoder reads the same words, but no <s>.
    assert words.bos not in prompts.names and words.bos not in prompts.description
    assert tokenizer.text_ids(["Count dogs"]).tolist() == [[1, *words.encode_first("Count dogs")]]
    assert tokenizer.answer_ids("two") == (1, *words.encode_first("two"), 2)
    assert tokenizer.decode(tokenizer.answer_ids("two dogs")) == "two dogs"


@pytest.mark.parametrize("name", ["mistral", "minilm"])
def test_added_rows_touch_no_published_ids(name):
    """Class tokens are numbered behind every published id; their rows are in an embedding of their own."""
    words = open_words(published(name))
    before = [words.encode(text) for text in TEXTS]
    if name == "mistral":
        tokenizer = Tokenizer(words)
        instruction = Instruction(classes=tuple(f"name {k}" for k in range(80)))
        instruction = dataclasses.replace(instruction, text=instruction.render())
        ids = tokenizer.prompts([instruction], M).ids
        added = ids[ids >= words.vocab_size]
        assert added.tolist() == list(range(32000, 32080))
    else:
        tokenizer = Tokenizer(SentencePieceWords(TOKENIZER_FILE.read_bytes()), words)
        ids = tokenizer.prompts([parse(PROMPT)], M)
        assert max(int(ids.names.max()), int(ids.description.max())) < words.vocab_size == 30522
    assert [words.encode(text) for text in TEXTS] == before
    assert class_token_embedding(8).weight.shape == (512, 8)


# Folders


@pytest.mark.parametrize("make", [lambda: Tokenizer(TOKENIZER_FILE.read_bytes()), two_vocabularies])
def test_folders_keep_a_tokenizer(tmp_path, make):
    tokenizer = make()
    tokenizer.save(tmp_path)
    loaded = Tokenizer.from_folder(tmp_path)
    assert loaded.files == tokenizer.files
    assert (loaded.bos, loaded.eos) == (tokenizer.bos, tokenizer.eos)
    first, second = (one.prompts([parse(PROMPT)], M) for one in (tokenizer, loaded))
    assert all(
        torch.equal(getattr(first, f.name), getattr(second, f.name)) for f in dataclasses.fields(first)
    )


def test_a_folder_holds_one_tokenizer(tmp_path):
    two_vocabularies().save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "text_tokenizer.json"}
    Tokenizer(TOKENIZER_FILE.read_bytes()).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
    assert Tokenizer.from_folder(tmp_path).text_words is None


def test_files_of_two_folders_make_one_tokenizer(tmp_path):
    llm, text = tmp_path / "llm", tmp_path / "bert"
    llm.mkdir(), text.mkdir()
    (llm / "tokenizer.model").write_bytes(sentencepiece_like_llama())
    (text / "vocab.txt").write_text("\n".join(wordpieces()))
    tokenizer = Tokenizer.from_file(llm, text)
    assert tokenizer.text_words.before == (2,)
    assert set(tokenizer.files) == {"tokenizer.model", "text_tokenizer.json"}


def test_file_names_do_not_depend_on_where_they_came_from():
    assert Path(TOKENIZER_FILE).name in Tokenizer.from_file(TOKENIZER_FILE).files
