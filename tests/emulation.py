"""Runs operators' CUDA kernels on the CPU: the test side of ``cuda/emulation`` (docs/emulation.md).

    with emulated() as device:
        output = lora_linear._forward_cuda(...)     # CPU tensors; native.call goes to the emulator
    assert [launch.name for launch in device.launches] == ["lora_linear"]

Each operator's driver is built when a test first asks for it, in ``build/emulation`` of the source tree, and
again when a source has changed; without cmake or a compiler the test fails and says so.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from visionllm.ops import native

ROOT = Path(__file__).resolve().parents[1]
# Another folder lets two people build at a time: each folder has one lock.
BUILD = Path(os.environ.get("VISIONLLM_EMULATION_BUILD", ROOT / "build" / "emulation"))
ORDERS = {"seeded": 0, "forward": 1, "reversed": 2}
MAX_SHARED_BYTES = 101376  # of a block on sm_89 and sm_120, the least of the GPUs aimed at


class EmulationError(AssertionError):
    """A bug that the emulator or a sanitizer found in a kernel or launcher."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the operator made it."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_shared_bytes: int
    static_shared_bytes: int


@dataclass
class Emulation:
    """How calls run, and what the latest one launched."""

    sanitize: bool = False
    seed: int = 0
    block_order: str = "seeded"
    thread_order: str = "seeded"
    repeats: int = 1  # each call runs this often, with seeds from `seed` on; the last results count
    deterministic: bool = False  # then all repeats must agree in every bit
    max_shared_bytes: int = MAX_SHARED_BYTES
    multiprocessors: int = 4
    driver: str | None = None  # None: chosen by the operator's name
    launches: list[Launch] = field(default_factory=list)


@contextmanager
def emulated(**options: object) -> Iterator[Emulation]:
    """While open, ``visionllm.ops.native.call`` runs CUDA kernels under emulation; see ``Emulation``.

    The tensors are CPU tensors; the operator gets exact copies of their memory, marked as CUDA's, and outputs
    filled with NaN. Calls raise what the compiled module raises, and ``EmulationError`` for a bug.
    """
    emulation = Emulation(**options)  # type: ignore[arg-type]
    original = native.call
    native.call = lambda name, *arguments: call(emulation, name, *arguments)  # type: ignore[assignment]
    try:
        yield emulation
    finally:
        native.call = original  # type: ignore[assignment]


def call(emulation: Emulation, name: str, *arguments: native.Argument) -> None:
    """Runs the public C++ function ``name``: tensors (None: absent) and numbers in its order.

    Raises:
        ValueError, RuntimeError: the function's own refusal.
        EmulationError: a bug; the message names kernel, block and thread.
    """
    driver = _driver(emulation.driver or _operator_of(name), emulation.sanitize)
    tensors = [a for a in arguments if a is None or isinstance(a, Tensor)]
    first: dict[int, bytes] = {}
    for repeat in range(emulation.repeats):
        seed = emulation.seed + repeat
        seeds = emulation.seed, seed
        outputs, emulation.launches = driver.call(emulation, seed, name, arguments)
        if repeat == 0:
            first = outputs
        elif emulation.deterministic:
            for number, data in outputs.items():
                if data != first[number]:
                    _raise_difference(name, tensors[number], number, first[number], data, seeds)
    for number, data in outputs.items():
        tensor = tensors[number]
        assert tensor is not None
        if tensor.numel():
            tensor.copy_(_view(tensor, data))


def _view(like: Tensor, data: bytes) -> Tensor:
    """A tensor of the same shape and strides over bytes that came back."""
    flat = torch.frombuffer(bytearray(data), dtype=like.dtype)
    return flat.as_strided(like.shape, like.stride())


def _raise_difference(
    name: str, tensor: Tensor | None, number: int, first: bytes, second: bytes, seeds: tuple[int, int]
) -> None:
    assert tensor is not None
    a, b = _view(tensor, first), _view(tensor, second)
    differ = (a != b) & ~((a != a) & (b != b))
    place = differ.nonzero()[0].tolist() if differ.any() else "sign or payload bits"
    raise EmulationError(
        f"{name}: tensor {number} depends on the order in which blocks and threads run: seeds {seeds[0]} and "
        f"{seeds[1]} differ in {int(differ.sum())} of {tensor.numel()} elements, the first at {place}"
    )


# ---- drivers --------------------------------------------------------------------------------------------


def _operator_of(name: str) -> str:
    """The driver for a function: the longest operator whose name the function's begins with."""
    operators = [path.stem for path in (ROOT / "cpp" / "include" / "visionllm").glob("*.h")]
    fitting = [operator for operator in operators if name == operator or name.startswith(operator + "_")]
    assert fitting, f"no header in cpp/include/visionllm declares '{name}'"
    return max(fitting, key=len)


_drivers: dict[tuple[str, bool], Driver] = {}


def _driver(operator: str, sanitize: bool) -> Driver:
    key = operator, sanitize
    if key not in _drivers:
        _drivers[key] = Driver(build(operator, sanitize))
    return _drivers[key]


def build(operator: str, sanitize: bool) -> Path:
    """Builds an operator's driver if a source has changed; returns the program."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    assert cmake and ninja, (
        "CUDA kernels are tested by compiling them for the CPU: cmake and ninja, which are test requirements "
        "of the package, are not installed"
    )
    compiler = os.environ.get("CXX", "g++")
    assert shutil.which(compiler), (
        "CUDA kernels are tested by compiling them for the CPU: the C++ compiler "
        f"'{compiler}' is not installed"
    )
    BUILD.mkdir(parents=True, exist_ok=True)
    target = f"{operator}-{'sanitized' if sanitize else 'plain'}"
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may share the tree
        if not (BUILD / "build.ninja").exists():
            _run(
                cmake, "-S", ROOT / "cuda" / "emulation", "-B", BUILD, "-G", "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CXX_COMPILER={compiler}",
            )  # fmt: skip
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2")
        _run(cmake, "--build", BUILD, "--target", target, "--parallel", jobs)
    return BUILD / target


def _run(*command: str | Path) -> None:
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))} failed:\n{result.stdout}"


class Driver:
    """One driver process; started at the first call, and again after a crash."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()
        atexit.register(self.close)

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin and self._process.stdout
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None

    def call(
        self, emulation: Emulation, seed: int, name: str, arguments: tuple[native.Argument, ...]
    ) -> tuple[dict[int, bytes], list[Launch]]:
        """Bytes of each output by its tensor's number, and the launches."""
        if self._process is None:
            self._errors.seek(0)
            self._errors.truncate()
            self._process = subprocess.Popen(
                [self.program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={
                    **os.environ,
                    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:symbolize=0",
                    "UBSAN_OPTIONS": "print_stacktrace=0",
                },
            )
        request = _encode(emulation, seed, name, arguments)
        try:
            assert self._process.stdin
            self._process.stdin.write(request)
            self._process.stdin.flush()
            return self._reply()
        except (BrokenPipeError, EOFError):
            raise EmulationError(self._crash(name)) from None

    def _crash(self, name: str) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._process = None
        self._errors.seek(0)
        report = self._errors.read().decode(errors="replace").strip()
        return self._with_lines(f"{name}: the emulated kernel ended the driver (exit code {code}):\n{report}")

    def _reply(self) -> tuple[dict[int, bytes], list[Launch]]:
        outcome, message = self._number("I"), self._text()
        launches = []
        for _ in range(self._number("I")):
            kernel = self._text()
            sizes = [self._number("I") for _ in range(6)]
            shared = self._number("Q"), self._number("Q")
            launches.append(Launch(kernel, tuple(sizes[:3]), tuple(sizes[3:]), *shared))  # type: ignore[arg-type]
        outputs = {}
        for _ in range(self._number("I")):
            number = self._number("I")
            outputs[number] = self._read(self._number("Q"))
        if outcome == 1:
            raise ValueError(message)
        if outcome == 2:
            raise RuntimeError(message)
        if outcome == 3:
            raise EmulationError(self._with_lines(message))
        return outputs, launches

    def _read(self, count: int) -> bytes:
        assert self._process is not None and self._process.stdout
        data = self._process.stdout.read(count)
        if len(data) != count:
            raise EOFError
        return data

    def _number(self, code: str) -> int:
        return struct.unpack("<" + code, self._read(struct.calcsize("<" + code)))[0]

    def _text(self) -> str:
        return self._read(self._number("I")).decode(errors="replace")

    def _with_lines(self, message: str) -> str:
        """The message with source lines in place of the program's addresses, where addr2line is installed."""
        addr2line = shutil.which("addr2line")
        if addr2line is None:
            return message

        def line(match: re.Match[str]) -> str:
            # The address is where the call returns to: the call is before it.
            address = hex(int(match[1], 16) - 1)
            result = subprocess.run(
                [addr2line, "-i", "-e", self.program, address], capture_output=True, text=True, check=False
            )
            places = [place for place in result.stdout.split() if not place.startswith("??")]
            return "[" + " < ".join(p.removeprefix(f"{ROOT}/") for p in places) + "]" if places else match[0]

        message = re.sub(r"\[pc (0x[0-9a-f]+)\]", line, message)
        own = re.compile(rf"\(({re.escape(str(self.program))}\+)?(0x[0-9a-f]+)\)")
        return own.sub(lambda m: line(re.match(r"(0x[0-9a-f]+)", m[2])), message)  # type: ignore[arg-type]


def _encode(emulation: Emulation, seed: int, name: str, arguments: tuple[native.Argument, ...]) -> bytes:
    """The call as cuda/emulation/driver.cpp reads it."""
    parts = [
        struct.pack("<I", len(name)),
        name.encode(),
        struct.pack(
            "<QIIIII",
            seed,
            ORDERS[emulation.block_order],
            ORDERS[emulation.thread_order],
            emulation.max_shared_bytes,
            emulation.multiprocessors,
            len(arguments),
        ),
    ]
    for argument in arguments:
        if argument is None:
            parts.append(b"\0")
        elif isinstance(argument, Tensor):
            try:
                address, dtype, _, shape, strides = native.raw(argument)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            span = 0
            if argument.numel():
                span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
            count = span * argument.element_size()
            parts.append(struct.pack("<BIII", 1, dtype, argument.element_size(), len(shape)))
            parts.append(struct.pack(f"<{2 * len(shape)}q", *shape, *strides))
            parts.append(struct.pack("<IQ", address % 64, count))
            parts.append(ctypes.string_at(address, count) if count else b"")
        elif isinstance(argument, float):
            parts.append(struct.pack("<Bd", 3, argument))
        else:
            parts.append(struct.pack("<Bq", 2, int(argument)))
    return b"".join(parts)
