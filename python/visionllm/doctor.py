"""What works on this machine, and why the rest does not: the text of ``visionllm doctor``."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from importlib.resources import as_file, files
from types import ModuleType

import visionllm

__all__ = ["report"]

_PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "pycocotools",
    "sentencepiece",
    "safetensors",
    "pillow",
    "transformers",
)
_DEFAULT_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.model")


def report() -> str:
    """One line a fact; never raises for something that is missing or broken: that is what it reports."""
    core, core_problem = _import("visionllm._core")
    torch, torch_problem = _import("torch")
    lines = [
        ("visionllm", visionllm.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, _version(name)) for name in _PACKAGES),
        ("compiled core", str(core.version) if core else f"not usable: {core_problem}"),
        ("instruction set", _instruction_set(core) if core else "none: no compiled core"),
        ("CPU threads", _threads(torch)),
        ("CUDA kernels", _cuda_kernels(core) if core else "none: no compiled core"),
        ("CUDA in torch", _torch_cuda(torch) if torch else f"no: torch is not usable: {torch_problem}"),
        ("default model", _default_model()),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _import(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why not."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # a broken installation raises anything from ImportError to OSError
        return None, f"{type(error).__name__}: {error}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _instruction_set(core: ModuleType) -> str:
    wish = os.environ.get("VISIONLLM_ISA")
    source = f"by VISIONLLM_ISA={wish}" if wish else "the best of this machine"
    built, available = ", ".join(core.built_isas()), ", ".join(core.available_isas())
    try:
        return f"{core.active_isa()} ({source}; this machine can run {available}; built: {built})"
    except RuntimeError as error:
        return f"none: {error} (built: {built})"


def _threads(torch: ModuleType | None) -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{torch.get_num_threads()} used by torch, {usable} usable" if torch else f"{usable} usable"


def _cuda_kernels(core: ModuleType) -> str:
    architectures = core.cuda_architectures
    if not architectures:
        return "not built (-DVISIONLLM_CUDA=ON builds them); CUDA tensors take the PyTorch reference"
    problem = core.cuda_problem()
    return f"built for {', '.join(architectures)}; " + (f"not usable: {problem}" if problem else "usable")


def _torch_cuda(torch: ModuleType) -> str:
    if torch.version.cuda is None:
        return "no: this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"no: torch is built for CUDA {torch.version.cuda}, but finds no usable GPU or driver"
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"yes: CUDA {torch.version.cuda}, {names}"


def _default_model() -> str:
    folder = files("visionllm") / "weights" / "tiny"
    missing = [name for name in _DEFAULT_MODEL_FILES if not (folder / name).is_file()]
    if len(missing) == len(_DEFAULT_MODEL_FILES):
        return f"not found: expected in {folder}"
    if missing:
        return f"incomplete: {folder} lacks {', '.join(missing)}"
    with as_file(folder / "model.safetensors") as path:
        size = path.stat().st_size / 1e6
    return f"tiny, {size:.1f} MB, in {folder}"
