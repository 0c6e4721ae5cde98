"""The whole way from pictures and an instruction to results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from visionllm.image import MAX_PIXELS, ImageSource, open_image, resize_square, source_name
from visionllm.instruction import Instruction, parse
from visionllm.instruction.instruction import MAX_CLASSES
from visionllm.result import Boxes, Result

if TYPE_CHECKING:
    from visionllm.instruction import Template
    from visionllm.model.network import Network

MAX_BOXES = 100  # candidates kept per picture, as the COCO metrics do
DEFAULT_MODEL = "tiny"
ANSWERED_TASKS = ("detection", "grounding")

InstructionLike = str | Instruction


@dataclass(frozen=True)
class Request:
    """What is asked of one picture: all classes, and instructions that ask for consecutive parts of them."""

    classes: tuple[str, ...]
    instructions: tuple[Instruction, ...]


class VisionLLM:
    """A trained network with everything around it: reading pictures, batching, results.

    Attributes:
        network: the `visionllm.model.Network`, in inference mode.
        threshold: score from which an object is shown, where a call does not say otherwise.
        dtype: of the products; with bfloat16 everything else stays in float32, as in training.
    """

    def __init__(self, network: Network, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
        self.network = network.eval()
        self.threshold: float = network.config.score_threshold

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> VisionLLM:
        """Loads a folder written by `save_pretrained` or by training.

        Args:
            folder: holds ``config.json``, ``model.safetensors`` and ``tokenizer.model``.
            device: "cpu", "cuda", "cuda:1", ...; None: a GPU if torch has one, else the CPU.
            dtype: torch.float32, or torch.bfloat16 for twice the speed of products where the processor has
                instructions for it.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: the files do not fit together; the message lists the differences. Or there is no such
                device.
        """
        from visionllm.model.network import Network

        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{os.fspath(folder)}: expected a model folder, found none")
        keep_freed_memory()
        return cls(Network.from_pretrained(Path(folder), device=checked_device(device)), dtype)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the folder that `from_pretrained` reads."""
        self.network.save_pretrained(Path(folder))

    def predict(
        self,
        images: ImageSource | Iterable[ImageSource],
        instruction: InstructionLike | Sequence[InstructionLike],
        threshold: float | None = None,
        batch_size: int = 8,
        max_pixels: int | None = MAX_PIXELS,
    ) -> Result | list[Result]:
        """What the instruction asks for, found in one picture or in several.

        Args:
            images: a picture (path, bytes, binary file, PIL image, NumPy array ``[H, W, 3]``), or a list or
                iterator of pictures; an array ``[N, H, W, 3]`` is N pictures.
            instruction: in words or typed; or a list of them, one for each picture.
            threshold: score in 0..1 from which an object is in ``Result.boxes``; None: the model's own.
            batch_size: pictures in one pass.
            max_pixels: larger pictures are refused; None: no limit.

        Returns:
            A Result for one picture, else a list of them in the order of the pictures.

        Raises:
            InstructionError: the text is no instruction; says where and what was expected.
            ImageError: a picture is missing or broken; names it.
            ValueError: another argument is out of its bounds.
        """
        if isinstance(instruction, (str, Instruction)):
            asked: Request | list[Request] = request_of(instruction)
        else:
            asked = [request_of(item) for item in instruction]
        return self._answer_all(images, asked, threshold, batch_size, max_pixels)

    def detect(
        self,
        images: ImageSource | Iterable[ImageSource],
        classes: Sequence[str],
        threshold: float | None = None,
        batch_size: int = 8,
        max_pixels: int | None = MAX_PIXELS,
    ) -> Result | list[Result]:
        """Like `predict`, with class names in place of an instruction: any number of them.

        More than 512 names are asked in equal groups, and a picture's 100 best boxes of all are kept.
        """
        return self._answer_all(images, class_request(classes), threshold, batch_size, max_pixels)

    def answer(
        self, images: Sequence[np.ndarray], requests: Sequence[Request], threshold: float
    ) -> list[Result]:
        """One batch: pictures that are read already, uint8 RGB ``[H, W, 3]``, each with its request.

        Everything else ends here; `visionllm.evaluate` calls it with a request of its own for each picture.
        """
        if not images:
            return []
        size = self.network.config.image_size
        pixels = torch.from_numpy(np.stack([resize_square(image, size) for image in images]))  # [B, S, S, 3]
        found: list[list[Any]] = [[] for _ in images]
        # The first groups of all pictures in one pass, then the second groups, ...
        rounds = max((len(asked.instructions) for asked in requests), default=0)
        for turn in range(rounds):
            members = [i for i, asked in enumerate(requests) if turn < len(asked.instructions)]
            asked_now = [requests[i].instructions[turn] for i in members]
            shown = pixels[members] if len(members) < len(images) else pixels
            with self._precision():
                detections = self.network.detect(shown, asked_now, top=MAX_BOXES)
            for i, detection in zip(members, detections, strict=True):
                found[i].append(detection)
        return [
            Result(
                image=image,
                all_boxes=_merge(parts, asked, image.shape[1], image.shape[0]),
                classes=asked.classes,
                instructions=asked.instructions,
                threshold=threshold,
            )
            for image, asked, parts in zip(images, requests, found, strict=True)
        ]

    def _precision(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.network.device.type, self.dtype)

    def _answer_all(
        self,
        images: ImageSource | Iterable[ImageSource],
        asked: Request | list[Request],
        threshold: float | None,
        batch_size: int,
        max_pixels: int | None,
    ) -> Result | list[Result]:
        threshold = self._checked_threshold(threshold)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        several = _is_several(images)
        sources: list[Any] = list(images) if several else [images]  # type: ignore[arg-type]
        requests = [asked] * len(sources) if isinstance(asked, Request) else asked
        if len(requests) != len(sources):
            raise ValueError(
                f"instruction: expected one, or {len(sources)} for as many pictures, got {len(requests)}"
            )
        results: list[Result] = []
        for start in range(0, len(sources), batch_size):
            batch = sources[start : start + batch_size]
            opened = [open_image(source, max_pixels) for source in batch]
            results += self.answer(opened, requests[start : start + batch_size], threshold)
            for source, result in zip(batch, results[start:], strict=True):
                result.source = source_name(source)
        return results if several else results[0]

    def _checked_threshold(self, threshold: float | None) -> float:
        if threshold is None:
            return self.threshold
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: expected a score in 0..1, got {threshold}")
        return float(threshold)


def load(
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> VisionLLM:
    """The model that comes with the package, or one from a folder.

    Args:
        model: a folder as for `VisionLLM.from_pretrained`, or, as text, the name of packaged weights, which
            goes before a folder of that name in the working directory: that one is "./name".
        device, dtype: as for `VisionLLM.from_pretrained`.

    Raises:
        FileNotFoundError: neither a folder nor packaged weights; says what to do.
    """
    return VisionLLM.from_pretrained(model_folder(model), device, dtype)


@cache
def keep_freed_memory() -> None:
    """Makes glibc keep what a prediction frees for the next one.

    It gives blocks above 128 KiB back to the kernel until a larger one was freed, and then keeps blocks up to
    that size (mallopt(3), M_MMAP_THRESHOLD; at most 32 MiB). Without this, a picture met 2900 fresh pages,
    which took 12 of 89 ms. Elsewhere it does nothing. The block is never written to, so it costs no memory.
    """
    np.empty(31 << 20, np.uint8)


def model_folder(model: str | os.PathLike[str] = DEFAULT_MODEL) -> Path:
    """The folder that `load` reads; raises FileNotFoundError as it does."""
    name = os.fspath(model)
    weights = Path(str(resources.files("visionllm"))) / "weights"
    is_bare_name = isinstance(model, str) and name == Path(name).name
    if is_bare_name and (weights / name / "model.safetensors").is_file():
        return weights / name
    if Path(model).is_dir():
        return Path(model)
    packaged = sorted(entry.parent.name for entry in weights.glob("*/model.safetensors"))
    raise FileNotFoundError(
        f"{name}: expected a model folder or the name of packaged weights. In this installation: "
        f"{', '.join(packaged) or 'none'} (looked in {weights}). "
        "Install a release of visionllm, which carries the weights, or train a model with "
        "`visionllm train` and give its folder."
    )


def checked_device(device: str | None) -> torch.device:
    """The device of that name; None: a GPU if torch has one, else the CPU.

    Raises:
        ValueError: torch knows no such name, or finds no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda, cuda:1, ..., got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {device!r}, but torch finds {torch.cuda.device_count()} CUDA devices")
    return found


def request_of(instruction: InstructionLike) -> Request:
    """An instruction as it is asked.

    Raises:
        InstructionError: the text is no instruction.
        ValueError: its task is not one that this version answers.
        TypeError: neither text nor an Instruction.
    """
    if isinstance(instruction, str):
        instruction = parse(instruction)
    elif not isinstance(instruction, Instruction):
        raise TypeError(f"instruction: expected text or an Instruction, got {type(instruction).__name__}")
    if instruction.task not in ANSWERED_TASKS:
        raise ValueError(
            f"instruction: expected one of the tasks {', '.join(ANSWERED_TASKS)}, got {instruction.task}"
        )
    return Request(instruction.classes, (instruction,))


def class_request(classes: Sequence[str], template: Template | None = None) -> Request:
    """Any number of classes, asked in as few groups of at most MAX_CLASSES as can be, of nearly equal size.

    Args:
        classes: their names.
        template: the wording; None: the default one.

    Raises:
        ValueError: no classes, an empty name or the same name twice.
    """
    if isinstance(classes, str):
        raise ValueError(f"classes: expected a list of names, got the text {classes!r}: write [{classes!r}]")
    names = tuple(classes)
    if not names:
        raise ValueError("classes: expected at least one name, got none")
    seen: set[str] = set()
    for position, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"classes: expected a name at position {position}, got {name!r}")
        if name in seen:
            raise ValueError(f"classes: {name!r} is listed twice")
        seen.add(name)
    groups = -(-len(names) // MAX_CLASSES)
    bounds = [len(names) * group // groups for group in range(groups + 1)]
    parts = [names[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    if template is not None:
        return Request(names, tuple(template.instruction(part) for part in parts))
    return Request(names, tuple(Instruction(classes=part) for part in parts))


def _merge(parts: Sequence[Any], asked: Request, width: int, height: int) -> Boxes:
    """The groups' Detections of one picture as the best 100 boxes in its pixels."""
    scores = np.concatenate([part.scores.float().cpu().numpy() for part in parts])  # [n]
    xyxy = np.concatenate([part.boxes.float().cpu().numpy() for part in parts])  # [n, 4] in 0..1
    centers = np.concatenate([part.centers.float().cpu().numpy() for part in parts])  # [n, 2]
    offset, labels = 0, []
    for part, group in zip(parts, asked.instructions, strict=True):
        labels.append(part.labels.cpu().numpy() + offset)
        offset += len(group.classes)
    order = np.argsort(-scores, kind="stable")[:MAX_BOXES]
    kept = np.concatenate(labels)[order].astype(np.int64)  # [n]
    size = np.array([width, height] * 2, np.float32)
    return Boxes(
        xyxy=np.clip(xyxy[order], 0, 1).astype(np.float32) * size,
        scores=scores[order].astype(np.float32),
        labels=kept,
        names=[asked.classes[label] for label in kept],
        centers=centers[order].astype(np.float32),
    )


def _is_several(images: Any) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim == 4
    return isinstance(images, (list, tuple)) or (hasattr(images, "__next__") and not hasattr(images, "read"))
