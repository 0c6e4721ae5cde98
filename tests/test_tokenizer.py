"""Text to ids and back, prompts as batches, and the SentencePiece model that comes with the package."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_network import TOKENIZER_FILE

from visionllm import tokenizer as tokenizer_module
from visionllm.instruction import EVAL_TEMPLATES, TRAIN_TEMPLATES, Instruction, InstructionError, parse
from visionllm.tokenizer import (
    IMAGE,
    MAX_DESCRIPTION_TOKENS,
    MAX_NAME_TOKENS,
    PADDING,
    Tokenizer,
    pad,
    train_sentencepiece,
)

M = 5  # image tokens
TEXT = (
    'Find {"dog": <c0>, "red car": <c1>} in <image>. Use (c, x1, y1, x2, y2) within the range 512, offsets.'
)


def with_text(classes: tuple[str, ...], template=None) -> Instruction:
    instruction = Instruction(classes=classes)
    if template is not None:
        instruction = dataclasses.replace(instruction, coordinates=template.coordinates)
    return dataclasses.replace(instruction, text=instruction.render(template))


def words(tokenizer: Tokenizer, ids: torch.Tensor) -> str:
    """Ids of a prompt as the text they came from."""
    text, pieces = "", []
    for i in [*ids.tolist(), PADDING]:
        if 0 <= i < tokenizer.vocab_size:
            pieces.append(i)
            continue
        text, pieces = text + tokenizer.decode(pieces), []
        if i >= tokenizer.vocab_size:
            text += f"<c{i - tokenizer.vocab_size}>"
        elif i == IMAGE and not text.endswith("<image>"):
            text += "<image>"
    return text


def test_a_prompt_holds_the_whole_text(tokenizer):
    prompts = tokenizer.prompts([parse(TEXT)], M)
    assert prompts.ids.dtype == torch.int64
    # Names are read as in running text, with a space before them.
    assert words(tokenizer, prompts.ids[0]) == TEXT.replace('"dog', '" dog').replace('"red', '" red')
    assert (prompts.ids == IMAGE).sum() == M
    places = (prompts.ids[0] == IMAGE).nonzero().flatten()
    assert places.tolist() == list(range(int(places[0]), int(places[0]) + M))


@pytest.mark.parametrize("template", [*TRAIN_TEMPLATES["detection"][::9], *EVAL_TEMPLATES["detection"]])
def test_every_name_and_its_class_token_is_marked(tokenizer, template):
    classes = ("dog", "red car", "0", "teddy bear")
    prompts = tokenizer.prompts([with_text(classes, template)], M)
    for k, name in enumerate(classes):
        marked = prompts.ids[0][prompts.name_index[0] == k].tolist()
        assert marked == [*tokenizer.encode_name(name), tokenizer.vocab_size + k]
    unmarked = prompts.ids[0][prompts.name_index[0] == -1]
    assert (unmarked < tokenizer.vocab_size).all()


def test_distinct_names_are_rows(tokenizer):
    prompts = tokenizer.prompts([with_text(("dog", "cat")), with_text(("teddy bear", "dog"))], M)
    rows = [
        [tuple(i for i in prompts.names[r].tolist() if i != PADDING) for r in row] for row in prompts.name_row
    ]
    expected = [["dog", "cat"], ["teddy bear", "dog"]]
    assert rows == [[tokenizer.encode_name(name) for name in row] for row in expected]
    assert len(prompts.names) == 3


def test_class_sets_of_several_sizes_are_padded(tokenizer):
    instructions = [with_text(("dog",)), with_text(("cat", "cup", "fork")), with_text(("red car", "dog"))]
    prompts = tokenizer.prompts(instructions, M)
    assert prompts.class_mask.tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    assert prompts.name_row.shape == (3, 3) and (prompts.name_row[~prompts.class_mask] == 0).all()
    for i, instruction in enumerate(instructions):
        alone = tokenizer.prompts([instruction], M)
        for field in ("ids", "name_index", "description"):
            row, whole = getattr(alone, field)[0], getattr(prompts, field)[i]
            assert whole[: len(row)].tolist() == row.tolist(), field
            assert (whole[len(row) :] == -1).all(), field  # PADDING, and "no class"


@pytest.mark.parametrize("text", [TEXT.replace(" in <image>", ""), TEXT + " Look at <image> well."])
def test_a_prompt_takes_exactly_one_picture(tokenizer, text):
    with pytest.raises(InstructionError, match="`<image>`"):
        tokenizer.prompts([dataclasses.replace(parse(TEXT), text=text)], M)


def test_a_class_may_be_called_image(tokenizer):
    prompts = tokenizer.prompts([with_text(("<image>", "dog"))], M)
    assert (prompts.ids == IMAGE).sum() == M
    assert (prompts.ids[prompts.name_index >= 0] >= 0).all()


def test_the_description_is_the_text_around_the_class_set(tokenizer):
    prompts = tokenizer.prompts([parse(TEXT)], M)
    described = tokenizer.decode(prompts.description[0].tolist())
    assert described.startswith('Find {"') and described.endswith("within the range 512, offsets.")
    assert "dog" not in described and "car" not in described


@pytest.mark.parametrize(
    "typed",
    [
        '"dog": <c0>, "red car": <c1>',
        '"dog"   :   <c0>   ,   "red car"   :   <c1>',
        '"dog": <c0>,\n        "red car":\n        <c1>',
        '"red car": <c1>; "dog": <c0>',
    ],
)
def test_how_a_class_set_is_typed_does_not_change_the_description(tokenizer, typed):
    text = TEXT.replace('"dog": <c0>, "red car": <c1>', typed)
    found, expected = (tokenizer.prompts([parse(one)], M).description for one in (text, TEXT))
    assert torch.equal(found, expected)


def test_short_text_around_the_class_set_belongs_to_the_description(tokenizer):
    prompts = tokenizer.prompts([parse('Box {"dog": <c0>} <image> now')], M)
    assert tokenizer.decode(prompts.description[0].tolist()) == 'Box {"}  now'


def test_names_are_read_without_their_escapes(tokenizer):
    names = ('3" (wide) {"pipe', "like <c3>", "back\\slash")
    instruction = with_text(names)
    assert "\\<c3>" in instruction.text
    prompts = tokenizer.prompts([instruction, parse(instruction.text)], M)
    for row in (0, 1):
        for k, name in enumerate(names):
            marked = prompts.ids[row][prompts.name_index[row] == k].tolist()
            assert marked == [*tokenizer.encode_name(name), tokenizer.vocab_size + k]


def test_the_text_encoder_reads_a_bounded_part(tokenizer):
    long = "very " * 80 + "long name"
    text = TEXT.replace("Find", "Please " * 800 + "find").replace("red car", long)
    prompts = tokenizer.prompts([parse(text)], M)
    assert prompts.description.shape[1] == MAX_DESCRIPTION_TOKENS
    assert prompts.names.shape[1] == MAX_NAME_TOKENS
    assert words(tokenizer, prompts.ids[0]).count("very") == 80  # the LLM reads all


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cat",
        " cat",
        "  two  spaces ",
        "Ærøskøbing",
        "猫と犬",
        "🦖 \U0010ffff",
        "tab\tand\nnewline",
        "…−×",
    ],
)
def test_any_text_comes_back_from_its_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids) and tokenizer.words.processor.unk_id() not in ids


def test_digits_are_read_one_by_one(tokenizer):
    assert len(tokenizer.encode("1024")) == 4


def test_words_of_the_names_are_short(tokenizer):
    assert max(len(tokenizer.encode_name(name)) for name in ("dog", "person", "teddy bear", "cup")) <= 3


def test_no_instruction_is_refused(tokenizer):
    with pytest.raises(ValueError, match="at least one instruction"):
        tokenizer.prompts([], M)


@pytest.mark.parametrize("model", [b"", b"not a model"])
def test_a_broken_model_is_refused(model):
    with pytest.raises(ValueError, match="tokenizer: "):
        Tokenizer(model)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.model"):
        Tokenizer.from_file(tmp_path / "none.model")


def test_prompts_move_as_a_whole(tokenizer):
    moved = tokenizer.prompts([parse(TEXT)], M).to("meta")
    assert all(getattr(moved, field.name).is_meta for field in dataclasses.fields(moved))


def test_pad():
    assert pad([[1, 2], [], [3]], -7).tolist() == [[1, 2], [-7, -7], [3, -7]]
    assert pad([[]], 0).shape == (1, 1)


def test_training_twice_gives_the_same_bytes():
    sentences = [t.text for t in TRAIN_TEMPLATES["detection"]] + [" dog", " red car"] * 8
    first = train_sentencepiece(sentences, 400)
    assert first == train_sentencepiece(sentences, 400)
    assert first != train_sentencepiece(sentences, 401)


def test_the_command_makes_the_model_of_the_package(tmp_path):
    assert tokenizer_module.main(["--output", str(tmp_path / "tokenizer.model")]) == 0
    assert (tmp_path / "tokenizer.model").read_bytes() == TOKENIZER_FILE.read_bytes()
