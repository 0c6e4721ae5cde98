"""Fixtures that several tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The values of `isa` are asked for here, so that tests without it need no compiled module."""
    if "isa" in metafunc.fixturenames:
        from visionllm import _core

        metafunc.parametrize("isa", _core.available_isas(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn, in force for the test."""
    from visionllm import _core

    _core.set_isa(request.param)
    yield request.param
    _core.set_isa("")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads, for the test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["emulated", "device"])
def place(request: pytest.FixtureRequest) -> str:
    """Where CUDA kernels run: under emulation, and on a GPU if there is one."""
    import torch

    from visionllm.ops import native

    if request.param == "device" and not (torch.cuda.is_available() and native.has_cuda_kernels()):
        pytest.skip("no GPU, or this build has no CUDA kernels")
    return request.param


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer that comes with the package."""
    from small_network import TOKENIZER_FILE

    from visionllm.tokenizer import Tokenizer

    return Tokenizer.from_file(TOKENIZER_FILE)


@pytest.fixture(scope="session")
def network():
    """A small random network; tests that change it build their own."""
    from small_network import small_network

    return small_network()
