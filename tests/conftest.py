"""Fixtures that several tests share."""

from __future__ import annotations

import pytest


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
