"""The seed instructions: wordings with placeholders, by task.

Training draws one at random for each batch (section 3.2); those for evaluation are never trained on, so that
robustness to an unseen wording can be measured. The wordings stand in ``templates.json``;
``visionllm instructions multiply`` writes more of them in the same form.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .instruction import TASKS
from .render import Template


def load_templates(path: str | os.PathLike[str], part: str = "train") -> dict[str, list[Template]]:
    """The wordings of a file, ``{"detection": {"train": ["...", ...], "evaluation": [...]}, ...}``, by task.

    Args:
        path: the JSON file.
        part: ``"train"`` or ``"evaluation"``.

    Raises:
        ValueError: the file is not of this form, or a wording lacks a placeholder; says which.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object with tasks as keys, got {type(content).__name__}")
    templates = {}
    for task, parts in content.items():
        if task not in TASKS:
            raise ValueError(f"{path}: expected one of the tasks {', '.join(TASKS)}, got {task!r}")
        texts: Any = parts.get(part, []) if isinstance(parts, dict) else None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}, {task}: expected {{{part!r}: [text, ...]}}, got {str(parts)[:40]!r}")
        try:
            templates[task] = [Template(text, task) for text in texts]
        except ValueError as error:
            raise ValueError(f"{path}, {task}: {error}") from error
    return templates


_PATH = Path(__file__).with_name("templates.json")

TRAIN_TEMPLATES: dict[str, list[Template]] = load_templates(_PATH, "train")
EVAL_TEMPLATES: dict[str, list[Template]] = load_templates(_PATH, "evaluation")
