"""Rendering and the wordings: a rendered instruction parses back to itself, whatever its names."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from visionllm.instruction import (
    EVAL_TEMPLATES,
    TRAIN_TEMPLATES,
    Instruction,
    InstructionError,
    Template,
    class_set_text,
    format_text,
    parse,
)
from visionllm.instruction.render import unnamed_keypoint_templates

DETECTION = TRAIN_TEMPLATES["detection"] + EVAL_TEMPLATES["detection"]
SET_TEMPLATES = [
    template
    for corpus in (TRAIN_TEMPLATES, EVAL_TEMPLATES)
    for task in ("detection", "segmentation", "grounding", "keypoints")
    for template in corpus[task]
] + list(unnamed_keypoint_templates())
SYNTAX = [
    '"',
    "'",
    "\\",
    ":",
    ",",
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    "<c0>",
    "<c",
    "<image>",
    "<class>",
    "<range>",
    " ",
    "...",
]
SYNTAX += [
    '": <c1>',
    "', '",
    "(c, x1, y1)",
    "within the range 7",
    "offsets",
    "<expression>",
    "a",
    "\n",
    "“",
    "é",
    "polygon",
]
NAMES = st.one_of(
    st.text(min_size=1), st.lists(st.sampled_from(SYNTAX), min_size=1, max_size=6).map("".join)
).filter(lambda name: bool(name.strip()))
VQA = TRAIN_TEMPLATES["vqa"] + EVAL_TEMPLATES["vqa"]
KEYPOINT_NAMES = NAMES.filter(lambda name: "<" not in name)
TRICKY = (
    'a", "b": <c1>',
    "('b",
    "it's",
    "\\",
    "\\<c0>",
    '} ("x',
    " a ",
    "...",
    "<expression>",
    "{'",
    "}{",
    "a\\",
    "(c, x1, y1)",
)


def points_of(task: str) -> st.SearchStrategy[int]:
    least = {"segmentation": 3, "keypoints": 1}.get(task, 2)
    return st.integers(least, 64 if least != 2 else 2)


@st.composite
def written_instructions(draw: st.DrawFn) -> tuple[Instruction, Template]:
    template = draw(st.sampled_from(SET_TEMPLATES))
    names = draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    keypoints = ()
    if "<keypoints>" in template.text:
        keypoints = tuple(draw(st.lists(KEYPOINT_NAMES, min_size=1, max_size=6, unique=True)))
    instruction = Instruction(
        template.task,
        tuple(names),
        draw(st.integers(1, 10**9)),
        template.coordinates,
        len(keypoints) or draw(points_of(template.task)),
        keypoints=keypoints,
    )
    return instruction, template


def check_round_trip(instruction: Instruction, template: Template | None) -> None:
    text = instruction.render(template)
    parsed = parse(text)
    assert parsed == instruction
    assert parsed.text == text
    pieces = instruction.segments(template)
    assert "".join(segment.text for segment in pieces) == text
    assert parsed.segments() == pieces
    assert [s.index for s in pieces if s.kind == "class_token"] == list(range(len(instruction.classes)))
    assert [s.index for s in pieces if s.kind == "name"] == list(range(len(instruction.classes)))
    assert sum(s.kind == "image" for s in pieces) == 1


LISTED_KEYPOINTS = [template for template in SET_TEMPLATES if "<keypoints>" in template.text]


def listed(template: Template, *names: str) -> tuple[Instruction, Template]:
    """An instruction with these keypoints, and its template."""
    points = len(names)
    return Instruction("keypoints", ("dog",), 512, template.coordinates, points, keypoints=names), template


@settings(max_examples=400, deadline=None)
@given(written_instructions())
@example((Instruction(classes=TRICKY), DETECTION[0]))
@example(listed(LISTED_KEYPOINTS[0], "C"))
@example(listed(LISTED_KEYPOINTS[-1], "cls", "nose"))
def test_render_then_parse_is_the_identity(case):
    check_round_trip(*case)


PIECES = [
    *SYNTAX,
    "<c1>",
    '{"a": <c0>}',
    "within",
    "512",
    "-",
    "x1",
    "?",
    "caption",
    "question:",
    "segment",
    "12 points",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@example("<image><range>?")
@example('<image>{"a": <c0>}<range>')
def test_any_text_gives_an_instruction_or_an_error_with_a_position(text):
    try:
        parsed = parse(text)
    except InstructionError as error:
        assert 0 <= error.position <= len(text)
        return
    assert parsed.text is not None
    assert "".join(segment.text for segment in parsed.segments()) == parsed.text
    assert parse(parsed.text) == parsed


@pytest.mark.parametrize("name", TRICKY)
@pytest.mark.parametrize("task", ["detection", "grounding"])
def test_each_tricky_name_alone(name, task):
    check_round_trip(Instruction(task, (name,)), None)


@pytest.mark.parametrize("coordinates", ["offset", "absolute"])
@pytest.mark.parametrize(
    ("task", "points"), [("detection", 2), ("grounding", 2), ("segmentation", 24), ("keypoints", 17)]
)
def test_default_wording_of_every_task(task, points, coordinates):
    check_round_trip(Instruction(task, ("red car",), 1000, coordinates, points), None)


QUESTIONS = st.text(alphabet=st.characters(exclude_characters="<:"), min_size=1).map(str.strip).filter(bool)


@settings(max_examples=100, deadline=None)
@given(QUESTIONS)
def test_questions_round_trip(question):
    instruction = Instruction("vqa", question=question)
    assert parse(instruction.render()) == instruction


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(VQA), QUESTIONS | st.sampled_from(["How many boxes are red", "What is the answer"]))
def test_every_wording_of_a_question_gives_it_back(template, question):
    instruction = template.instruction(question=question + "?")
    assert parse(instruction.text) == instruction
    assert parse(instruction.text).segments() == instruction.segments()
    assert parse(template.text, question=question + "?") == instruction


@pytest.mark.parametrize("template", VQA, ids=lambda template: template.text[:30])
def test_every_wording_of_a_question_once(template):
    instruction = template.instruction(question="Is the box, if any, red?")
    assert parse(instruction.text) == instruction


def test_caption_round_trip():
    for template in TRAIN_TEMPLATES["captioning"] + EVAL_TEMPLATES["captioning"]:
        check_round_trip(Instruction("captioning", length=template.length), template)


@pytest.mark.parametrize("template", SET_TEMPLATES, ids=lambda template: template.text[:30])
def test_every_wording_says_range_and_coordinates(template):
    named = "<keypoints>" in template.text
    points = {"segmentation": 14, "keypoints": 3 if named else 17}.get(template.task, 2)
    names = ["nose", "left eye", "the tail's tip"] if named else []
    instruction = template.instruction(["dog", "cat"], 345, points, names)
    assert (instruction.range, instruction.coordinates) == (345, template.coordinates)
    assert parse(instruction.text) == instruction
    assert parse(instruction.text).segments() == instruction.segments()


def test_the_detection_corpus_is_large_varied_and_keeps_evaluation_apart():
    train = TRAIN_TEMPLATES["detection"]
    texts = [template.text for template in DETECTION]
    assert len(train) >= 60
    assert len(EVAL_TEMPLATES["detection"]) == 8
    assert len(set(texts)) == len(texts)
    words = [len(template.text.replace("<class>", "").split()) for template in train]
    assert sum(count <= 25 for count in words) >= len(train) / 2
    assert max(words) >= 60
    image_first = sum(template.text.index("<image>") < template.text.index("<class>") for template in train)
    assert 0.6 <= image_first / len(train) <= 0.75
    assert 0.4 <= sum(template.coordinates == "offset" for template in train) / len(train) <= 0.6
    assert 0.3 <= sum("(c, x1, y1, x2, y2)" in template.text for template in train) / len(train) <= 0.7
    assert {template.coordinates for template in EVAL_TEMPLATES["detection"]} == {"offset", "absolute"}


@pytest.mark.parametrize("task", TRAIN_TEMPLATES)
def test_every_task_has_many_wordings_and_some_that_are_never_trained_on(task):
    train, evaluation = TRAIN_TEMPLATES[task], EVAL_TEMPLATES[task]
    assert len(train) >= 60
    assert len(evaluation) == 8
    plain = {" ".join(template.text.lower().split()).rstrip(".:") for template in train + evaluation}
    assert len(plain) == len(train) + len(evaluation)
    if task in ("captioning", "vqa"):
        assert {template.length for template in train} >= (
            {"short", "long", "detailed"} if task == "captioning" else {"short"}
        )
        return
    for templates in (train, evaluation):
        offsets = sum(template.coordinates == "offset" for template in templates)
        assert 0.4 <= offsets / len(templates) <= 0.6
    if task == "keypoints":
        assert all("<keypoints>" in template.text for template in train + evaluation)


@pytest.mark.parametrize("length", ["short", "long", "detailed"])
def test_captions_of_every_length(length):
    for corpus, least in ((TRAIN_TEMPLATES, 20), (EVAL_TEMPLATES, 2)):
        assert sum(template.length == length for template in corpus["captioning"]) >= least
    check_round_trip(Instruction("captioning", length=length), None)


def test_class_set_text():
    assert class_set_text(["person", "car"]) == '{"person": <c0>, "car": <c1>}'
    assert class_set_text(["bat_(animal)", "child's toy"]) == '{"bat_(animal)": <c0>, "child\'s toy": <c1>}'


@pytest.mark.parametrize(
    ("points", "text"),
    [
        (1, "(c, x1, y1)"),
        (2, "(c, x1, y1, x2, y2)"),
        (3, "(c, x1, y1, x2, y2, x3, y3)"),
        (4, "(c, x1, y1, x2, y2, ..., x4, y4)"),
        (8, "(c, x1, y1, x2, y2, ..., x8, y8)"),
    ],
)
def test_format_text(points, text):
    assert format_text(points) == text


def test_templates_say_what_is_wrong_with_them():
    with pytest.raises(ValueError, match="expected <image> once, found it 0 times"):
        Template("Detect <class>.")
    with pytest.raises(ValueError, match="expected <class> once, found it 2 times"):
        Template("<image> <class> <class>")
    absolute = Template("<image> <class> by coordinates within <range>")
    with pytest.raises(ValueError, match="offset coordinates"):
        Instruction(classes=("dog",)).render(absolute)
    with pytest.raises(ValueError, match="template for grounding"):
        Instruction("grounding", ("dog",)).render(absolute)
    with pytest.raises(ValueError, match="needs <range>"):
        Template("<image> <class>").instruction(["dog"], 100)
    with pytest.raises(ValueError, match="need <format>"):
        Template("Segment <class> in <image>", "segmentation").instruction(["dog"], points=8)
