"""The seed instructions: wordings with placeholders, by task.

Training draws one at random for each batch (section 3.2); those for evaluation are never trained on, so that
robustness to an unseen wording can be measured. The wordings stand in ``templates.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

from .render import Template

_DATA = json.loads(Path(__file__).with_name("templates.json").read_text(encoding="utf-8"))

TRAIN_TEMPLATES: dict[str, list[Template]] = {
    task: [Template(text, task) for text in parts["train"]] for task, parts in _DATA.items()
}
EVAL_TEMPLATES: dict[str, list[Template]] = {
    task: [Template(text, task) for text in parts["evaluation"]] for task, parts in _DATA.items()
}
