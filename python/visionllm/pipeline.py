"""The whole way from pictures and an instruction to results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from visionllm.detections import MAX_BOXES, result_of
from visionllm.image import MAX_PIXELS, ImageSource, network_batch, open_image, source_name
from visionllm.instruction import Instruction
from visionllm.instruction.instruction import SET_TASKS
from visionllm.model_folder import DEFAULT_MODEL, checked_device, keep_freed_memory, model_folder
from visionllm.request import (
    InstructionLike,
    Request,
    checked_names,
    class_request,
    request_of,
    requests_of,
)
from visionllm.result import Result
from visionllm.text_options import TextOptions

if TYPE_CHECKING:
    from visionllm.model.config import ModelConfig
    from visionllm.model.network import Network

__all__ = ["Request", "VisionLLM", "class_request", "load", "model_folder", "request_of"]

TextListener = Callable[[int, str], None]  # told (picture, what was written next) while a text is written


@dataclass(frozen=True)
class Pictures:
    """A batch as the network takes it.

    Attributes:
        pixels: uint8 [B, H, W, 3].
        sizes, originals: as for `Network.find`, or None.
    """

    pixels: torch.Tensor
    sizes: torch.Tensor | None
    originals: Sequence[np.ndarray] | None

    @classmethod
    def of(cls, images: Sequence[np.ndarray], config: ModelConfig) -> Pictures:
        pixels, sizes = network_batch(images, config.image_size, config.longest_side)
        lengths = None if sizes is None else torch.from_numpy(sizes)
        return cls(torch.from_numpy(pixels), lengths, images if config.classifier_names else None)

    @property
    def beside(self) -> dict[str, Any]:
        """The arguments ``sizes`` and ``originals`` where the network has a use for them."""
        every = {"sizes": self.sizes, "originals": self.originals}
        return {name: value for name, value in every.items() if value is not None}

    def rows(self, members: Sequence[int]) -> Pictures:
        """The pictures at these places, in ascending order."""
        if len(members) == len(self.pixels):
            return self
        rows = list(members)
        return Pictures(
            self.pixels[rows],
            None if self.sizes is None else self.sizes[rows],
            None if self.originals is None else [self.originals[row] for row in rows],
        )


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
        adapter: str | os.PathLike[str] | None = None,
    ) -> VisionLLM:
        """Loads a folder written by `save_pretrained` or by training.

        Args:
            folder: holds ``config.json``, ``model.safetensors`` and ``tokenizer.model``.
            device: "cpu", "cuda", "cuda:1", ...; None: a GPU if torch has one, else the CPU.
            dtype: torch.float32, or torch.bfloat16 for twice the speed of products where the processor has
                instructions for it.
            adapter: folder that ``visionllm adapter`` wrote of a model that was trained from this one.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: the files do not fit together; the message lists the differences. Or there is no such
                device.
        """
        from visionllm.model.network import Network

        for path in (folder, *([] if adapter is None else [adapter])):
            if not Path(path).is_dir():
                raise FileNotFoundError(f"{os.fspath(path)}: expected a model folder, found none")
        keep_freed_memory()
        added = None if adapter is None else Path(adapter)
        return cls(Network.from_pretrained(Path(folder), checked_device(device), added), dtype)

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
        spread: bool = False,
        options: TextOptions | None = None,
        on_text: TextListener | None = None,
    ) -> Result | list[Result]:
        """What the instruction asks for, found in one picture or in several.

        Args:
            images: a picture (path, bytes, binary file, PIL image, NumPy array ``[H, W, 3]``), or a list or
                iterator of pictures; an array ``[N, H, W, 3]`` is N pictures.
            instruction: in words or typed; or a list of them, one for each picture, of any tasks. Where the
                parser does not know the output format that the words ask for, the model writes it, and
                ``Result.format_source`` says so.
            threshold: score in 0..1 from which an object is in ``Result.boxes``; None: the model's own.
            batch_size: pictures in one pass.
            max_pixels: larger pictures are refused; None: no limit.
            spread: also give each coordinate's standard deviation, ``Result.boxes.spread``.
            options: how captions and answers are written; None: greedily, at most 128 tokens.
            on_text: called with (position of the picture, next characters) while a text is written; not
                with ``options.beams``.

        Returns:
            A Result for one picture, else a list of them in the order of the pictures.

        Raises:
            InstructionError: the text is no instruction; says where and what was expected.
            ImageError: a picture is missing or broken; names it.
            ValueError: another argument is out of its bounds, or the model was not trained for the task.
        """
        one = isinstance(instruction, (str, Instruction))
        asked = self.requests([instruction] if one else instruction)  # type: ignore[list-item, arg-type]
        return self._run_all(
            images, asked[0] if one else asked, threshold, batch_size, max_pixels, spread, options, on_text
        )

    def detect(
        self,
        images: ImageSource | Iterable[ImageSource],
        classes: Sequence[str],
        threshold: float | None = None,
        batch_size: int = 8,
        max_pixels: int | None = MAX_PIXELS,
        spread: bool = False,
    ) -> Result | list[Result]:
        """Like `predict`, with class names in place of an instruction: any number of them.

        More than 512 names are asked in equal groups, and a picture's 100 best boxes of all are kept.
        """
        return self._run_all(images, class_request(classes), threshold, batch_size, max_pixels, spread)

    def segment(
        self,
        images: ImageSource | Iterable[ImageSource],
        classes: Sequence[str],
        points: int = 16,
        threshold: float | None = None,
        batch_size: int = 8,
        max_pixels: int | None = MAX_PIXELS,
        spread: bool = False,
    ) -> Result | list[Result]:
        """Like `detect`, with outlines of ``points`` points: ``Result.polygons`` and ``Result.masks``."""
        asked = class_request(classes, task="segmentation", points=points)
        return self._run_all(images, asked, threshold, batch_size, max_pixels, spread)

    def ground(
        self,
        images: ImageSource | Iterable[ImageSource],
        expressions: str | Sequence[str],
        threshold: float | None = None,
        batch_size: int = 8,
        max_pixels: int | None = MAX_PIXELS,
        spread: bool = False,
    ) -> Result | list[Result]:
        """Where what one or several expressions describe is, or that it is absent: ``Result.expressions``.

        Args:
            expressions: such as "the red car on the left"; the other arguments are `predict`'s.
        """
        expressions = [expressions] if isinstance(expressions, str) else expressions
        asked = class_request(expressions, task="grounding")
        return self._run_all(images, asked, threshold, batch_size, max_pixels, spread)

    def keypoints(
        self,
        images: ImageSource | Iterable[ImageSource],
        classes: Sequence[str],
        names: Sequence[str],
        threshold: float | None = None,
        batch_size: int = 8,
        max_pixels: int | None = MAX_PIXELS,
        spread: bool = False,
    ) -> Result | list[Result]:
        """Like `detect`, with the points of these names on each object: ``Result.keypoints``."""
        asked = class_request(classes, task="keypoints", keypoints=checked_names("keypoints", names))
        return self._run_all(images, asked, threshold, batch_size, max_pixels, spread)

    def caption(
        self,
        images: ImageSource | Iterable[ImageSource],
        length: str = "short",
        options: TextOptions | None = None,
        on_text: TextListener | None = None,
        batch_size: int = 8,
        max_pixels: int | None = MAX_PIXELS,
    ) -> Result | list[Result]:
        """A description: ``Result.text``.

        Args:
            length: "short", "long" or "detailed"; the other arguments are `predict`'s.
        """
        asked = request_of(Instruction("captioning", length=length))
        return self._run_all(images, asked, None, batch_size, max_pixels, False, options, on_text)

    def answer(
        self,
        images: ImageSource | Iterable[ImageSource],
        question: str | Sequence[str],
        options: TextOptions | None = None,
        on_text: TextListener | None = None,
        batch_size: int = 8,
        max_pixels: int | None = MAX_PIXELS,
    ) -> Result | list[Result]:
        """The answer to a question about the picture: ``Result.text``.

        Args:
            question: one, or a list of them, one for each picture; the other arguments are `predict`'s.
        """
        questions = [question] if isinstance(question, str) else question
        asked = requests_of([Instruction("vqa", question=text) for text in questions])
        return self._run_all(
            images,
            asked[0] if isinstance(question, str) else asked,
            None,
            batch_size,
            max_pixels,
            False,
            options,
            on_text,
        )

    def complete(
        self,
        text: str | Sequence[str],
        options: TextOptions | None = None,
        on_text: TextListener | None = None,
        chat: bool = True,
    ) -> str | list[str]:
        """What the language model alone answers, without a picture.

        Args:
            text: a question, or several, which are answered together.
            options: None: greedily, at most 128 tokens; on_text: as for `predict`.
            chat: put it in the form that the language model was published with, if it has one
                (`visionllm.chat`); False: go on from the text as it is.

        Returns:
            a text for one text, else a list of them.
        """
        texts = [text] if isinstance(text, str) else list(text)
        options = options or TextOptions()
        if on_text is not None and options.beams > 1:
            raise ValueError(f"on_text: expected 1 beam, as words come one by one, got {options.beams}")
        with self._precision():
            written = self.network.complete(texts, options, on_text, chat)
        return written[0] if isinstance(text, str) else written

    def run(
        self,
        images: Sequence[np.ndarray],
        requests: Sequence[Request],
        threshold: float,
        spread: bool = False,
        options: TextOptions | None = None,
        on_text: TextListener | None = None,
    ) -> list[Result]:
        """One batch: pictures that are read already, uint8 RGB ``[H, W, 3]``, each with its request.

        Everything else ends here; `visionllm.evaluate` calls it with a request of its own for each picture.
        Tasks, class sets and numbers of points may differ from picture to picture.
        """
        if not images:
            return []
        self._check_tasks(requests)
        pictures = Pictures.of(images, self.network.config)
        found = self._find(pictures, requests, spread)
        texts = self._write(pictures, requests, options, on_text)
        return [
            result_of(image, asked, threshold, found.get(i), texts.get(i))
            for i, (image, asked) in enumerate(zip(images, requests, strict=True))
        ]

    def _find(self, pictures: Pictures, requests: Sequence[Request], spread: bool) -> dict[int, list[Any]]:
        """Each picture's Detections, one for each of its instructions; the pictures of set tasks alone."""
        found: dict[int, list[Any]] = {i: [] for i, asked in enumerate(requests) if asked.task in SET_TASKS}
        # The first groups of all pictures in one pass, then the second groups, ...
        rounds = max((len(requests[i].instructions) for i in found), default=0)
        for turn in range(rounds):
            members = [i for i in found if turn < len(requests[i].instructions)]
            asked_now = [requests[i].instructions[turn] for i in members]
            shown = pictures.rows(members)
            with self._precision():
                detections = self.network.find(
                    shown.pixels, asked_now, top=MAX_BOXES, spread=spread, **shown.beside
                )
            for i, detection in zip(members, detections, strict=True):
                found[i].append(detection)
        return found

    def _write(
        self,
        pictures: Pictures,
        requests: Sequence[Request],
        options: TextOptions | None,
        on_text: TextListener | None,
    ) -> dict[int, str]:
        """The texts of the pictures whose task is answered in words."""
        members = [i for i, asked in enumerate(requests) if asked.task not in SET_TASKS]
        if not members:
            return {}
        options = options or TextOptions()
        if on_text is not None and options.beams > 1:
            raise ValueError(f"on_text: expected 1 beam, as words come one by one, got {options.beams}")
        shown = pictures.rows(members)
        listener = None if on_text is None else lambda row, piece: on_text(members[row], piece)
        with self._precision():
            asked_now = [requests[i].instructions[0] for i in members]
            texts = self.network.write(shown.pixels, asked_now, options, listener, **shown.beside)
        return dict(zip(members, texts, strict=True))

    def _check_tasks(self, requests: Iterable[Request]) -> None:
        for task in {asked.task for asked in requests}:
            self.network.check_task(task)

    def requests(self, instructions: Sequence[InstructionLike]) -> list[Request]:
        """Instructions as `run` takes them; output formats that the parser does not know, the model writes.

        Raises:
            InstructionError: a text is no instruction; says where and what was expected.
            TypeError: neither text nor an Instruction.
        """
        return requests_of(instructions, self._write_formats)

    def _write_formats(self, texts: Sequence[str]) -> list[str]:
        with self._precision():
            return self.network.write_format(texts)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.network.device.type, self.dtype)

    def _run_all(
        self,
        images: ImageSource | Iterable[ImageSource],
        asked: Request | list[Request],
        threshold: float | None,
        batch_size: int,
        max_pixels: int | None,
        spread: bool = False,
        options: TextOptions | None = None,
        on_text: TextListener | None = None,
    ) -> Result | list[Result]:
        threshold = self._checked_threshold(threshold)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        self._check_tasks([asked] if isinstance(asked, Request) else asked)
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
            listener = None if on_text is None else _shifted(on_text, start)
            asked_now = requests[start : start + batch_size]
            results += self.run(opened, asked_now, threshold, spread, options, listener)
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
    adapter: str | os.PathLike[str] | None = None,
) -> VisionLLM:
    """The model that comes with the package, or one from a folder.

    Args:
        model: a folder as for `VisionLLM.from_pretrained`, or, as text, the name of packaged weights, which
            goes before a folder of that name in the working directory: that one is "./name".
        device, dtype, adapter: as for `VisionLLM.from_pretrained`; an adapter may have a packaged name too.

    Raises:
        FileNotFoundError: neither a folder nor packaged weights; says what to do.
    """
    found = None if adapter is None else model_folder(adapter)
    return VisionLLM.from_pretrained(model_folder(model), device, dtype, found)


def _shifted(on_text: TextListener, start: int) -> TextListener:
    return lambda row, piece: on_text(start + row, piece)


def _is_several(images: Any) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim == 4
    return isinstance(images, (list, tuple)) or (hasattr(images, "__next__") and not hasattr(images, "read"))
