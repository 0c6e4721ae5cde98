"""LLaVA-Instruct: conversations about COCO's pictures (Liu et al. 2023, arXiv:2304.08485).

``llava_instruct_150k.json`` and its parts (conversation_58k, detail_23k, complex_reasoning_77k) are lists::

    id, image ("000000033471.jpg"), conversations: [
        {"from": "human", "value": "<image>\\nWhat are the colors of the bus?"},
        {"from": "gpt", "value": "The bus is white and red."}, ...]

Several entries can be about one picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visionllm.data.pictures_with_text import PictureCheck, PicturesWithText, PictureText
from visionllm.data.report import (
    EntryProblems,
    Report,
    check_section,
    described,
    is_id,
    read_json,
    wrong_file,
)
from visionllm.data.sample import Question

IMAGE_TOKEN = "<image>"
SPEAKERS = ("human", "gpt")  # in turn, beginning with the first
KIND = "conversation"  # `Question.kind`


class LlavaDataset(PicturesWithText):
    """Pictures with the questions of a conversation and their answers, one entry of the file a sample.

    Questions lose the mark of where the picture belongs and stand each by itself: a later one that refers to
    what was said before ("what else?") is kept as it is.

    Args:
        annotations: the JSON file.
        images: folder of COCO's pictures, of either release (see `visionllm.data.coco_pictures`).
        descriptions: the file asks for nothing but detailed descriptions (detail_23k): a conversation of one
            question gives its answer as a "detailed" caption instead.
        on_error, check_images, shown: as for `visionllm.data.coco.CocoDataset`.

    Raises:
        DatasetError: something is wrong and ``on_error`` is "fail", or the JSON cannot be used at all.
        ValueError: an argument is none of the allowed ones.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        descriptions: bool = False,
        on_error: str = "fail",
        check_images: str = "decode",
        shown: int = 20,
    ) -> None:
        content = _read(annotations)
        report = _check(content, annotations, images, check_images)
        entries = []
        for index in report.usable["entries"]:
            questions = _questions(content[index]["conversations"])
            described_only = descriptions and len(questions) == 1
            entries.append(
                PictureText(
                    file_name=content[index]["image"],
                    image_id=content[index]["id"],
                    captions={"detailed": [questions[0].answer]} if described_only else {},
                    questions=[] if described_only else questions,
                )
            )
        super().__init__(entries, images, report, on_error, shown)


def validate_llava(
    annotations: str | Path, images: str | Path | None, check_images: str = "decode"
) -> Report:
    """As `visionllm.data.validate.validate_coco`, for conversations; the report's list is "entries"."""
    return _check(_read(annotations), annotations, images, check_images)


def _read(file: str | Path) -> list[Any]:
    content = read_json(file, "a list of conversations")
    if not isinstance(content, list):
        raise wrong_file(file, f"expected a list of conversations, got {described(content)}")
    return content


def _check(content: list[Any], file: str | Path, images: str | Path | None, check_images: str) -> Report:
    picture_problem = PictureCheck(images, check_images)

    def problems(entry: dict) -> EntryProblems:
        if not is_id(entry.get("id"), (int, str)):
            yield "id", f"expected an id, got {described(entry['id'])}" if "id" in entry else "missing"
        message = picture_problem(entry, "image")
        if message:
            yield "image", message
        message = _conversation_problem(entry.get("conversations"))
        if message:
            yield "conversations", message

    report = Report()
    check_section(content, "entries", file, problems, report)
    return report


def _conversation_problem(turns: Any) -> str | None:
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        return f"expected questions and answers in turn, got {described(turns)}"
    for number, turn in enumerate(turns):
        speaker = SPEAKERS[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker:
            return f'turn {number}: expected "from": "{speaker}", got {described(turn)}'
        if not isinstance(turn.get("value"), str) or not _without_mark(turn["value"]):
            return f'turn {number}: expected "value" with text, got {described(turn.get("value"))}'
    return None


def _questions(turns: list[dict[str, str]]) -> list[Question]:
    texts = [_without_mark(turn["value"]) for turn in turns]
    return [Question(asked, answer, KIND) for asked, answer in zip(texts[::2], texts[1::2], strict=True)]


def _without_mark(text: str) -> str:
    return text.replace(IMAGE_TOKEN, "").strip()
