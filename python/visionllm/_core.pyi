"""The compiled module. Each operator's signature is in its docstring, its contract in its C++ header."""

from typing import Any

version: str
cuda_architectures: tuple[str, ...]

def __getattr__(name: str) -> Any: ...
