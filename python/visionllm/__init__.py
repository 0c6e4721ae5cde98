"""VisionLLM: an instruction and a picture in; boxes, polygons, keypoints or text out.

Everything here is imported when it is first used: ``import visionllm`` costs no torch, no compilation and
no network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from visionllm import arrays, ops
    from visionllm.image import ImageError, open_image
    from visionllm.instruction import Instruction, InstructionError
    from visionllm.pipeline import VisionLLM, load
    from visionllm.result import Boxes, Result
    from visionllm.text_options import TextOptions

# Public name: the module it lives in.
_HOME = {
    "Boxes": "visionllm.result",
    "ImageError": "visionllm.image",
    "Instruction": "visionllm.instruction",
    "InstructionError": "visionllm.instruction",
    "Result": "visionllm.result",
    "TextOptions": "visionllm.text_options",
    "VisionLLM": "visionllm.pipeline",
    "load": "visionllm.pipeline",
    "open_image": "visionllm.image",
}
_MODULES = (
    "arrays",
    "data",
    "doctor",
    "evaluate",
    "image",
    "instruction",
    "model",
    "ops",
    "pipeline",
    "result",
    "train",
)

__all__ = [
    "Boxes",
    "ImageError",
    "Instruction",
    "InstructionError",
    "Result",
    "TextOptions",
    "VisionLLM",
    "__version__",
    "arrays",
    "load",
    "open_image",
    "ops",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"visionllm.{name}")
    else:
        raise AttributeError(f"module 'visionllm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
