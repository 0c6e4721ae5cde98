"""What is said about generated scenes, as files in the forms of published data sets.

captions_short.json, captions_long.json, captions_detailed.json    COCO Caption
refs.json        RefCOCO's references as JSON; expressions that fit nothing have no place in that form
questions.json   LLaVA-Instruct's conversations; ``kinds`` has the kind of each question
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from visionllm.atomic_file import replacing
from visionllm.data.sample import CAPTION_LENGTHS, Sample

IMAGE_TOKEN = "<image>\n"


class SceneText:
    """Collects the text of scenes, and writes it.

    Args:
        split: of the scenes; every reference repeats it.
    """

    def __init__(self, split: str) -> None:
        self.split = split
        self._images: list[dict[str, Any]] = []
        self._captions: dict[str, list[dict[str, Any]]] = {length: [] for length in CAPTION_LENGTHS}
        self._refs: list[dict[str, Any]] = []
        self._conversations: list[dict[str, Any]] = []

    def add(self, sample: Sample, image: dict[str, Any], annotation_ids: list[int]) -> None:
        """Adds a scene.

        Args:
            image: its entry in COCO's form.
            annotation_ids: those of its objects.
        """
        self._images.append(image)
        for length, texts in sample.captions.items():
            rows = self._captions[length]
            rows += [
                {"id": len(rows) + k + 1, "image_id": image["id"], "caption": text}
                for k, text in enumerate(texts)
            ]
        for expression in sample.expressions:
            for k in expression.objects:
                number = len(self._refs) + 1
                self._refs.append(
                    {
                        "ref_id": number,
                        "image_id": image["id"],
                        "ann_id": annotation_ids[k],
                        "split": self.split,
                        "sentences": [{"sent_id": number, "sent": expression.text}],
                    }
                )
        if sample.questions:
            turns: list[dict[str, str]] = []
            for question in sample.questions:
                mark = "" if turns else IMAGE_TOKEN
                turns.append({"from": "human", "value": mark + question.text})
                turns.append({"from": "gpt", "value": question.answer})
            self._conversations.append(
                {
                    "id": str(image["id"]),
                    "image": image["file_name"],
                    "conversations": turns,
                    "kinds": [question.kind for question in sample.questions],
                }
            )

    def write(self, folder: Path) -> list[Path]:
        """Writes the files; returns their paths."""
        documents: dict[str, Any] = {
            f"captions_{length}.json": {"images": self._images, "annotations": rows}
            for length, rows in self._captions.items()
        }
        documents |= {"refs.json": self._refs, "questions.json": self._conversations}
        for name, document in documents.items():
            with replacing(folder / name) as part:
                part.write_text(json.dumps(document))
        return [folder / name for name in documents]
