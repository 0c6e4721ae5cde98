"""Published weights into this package's models: every tensor of a source has a place, or a reason for none.

``source`` reads folders and files lazily, ``keys`` gives each tensor its name here and accounts for all of
them, and one file per architecture holds its rules.
"""

from __future__ import annotations

from visionllm.convert.keys import ConvertError, Rule, Step, convert, fill, plan, shapes_of
from visionllm.convert.source import Source, TensorSource, open_source, read_config

__all__ = [
    "ConvertError",
    "Rule",
    "Source",
    "Step",
    "TensorSource",
    "convert",
    "fill",
    "open_source",
    "plan",
    "read_config",
    "shapes_of",
]
