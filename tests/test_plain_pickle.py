"""Plain data from pickles: as pickle itself reads them, and nothing of what could run code."""

from __future__ import annotations

import os
import pickle
import pickletools
from collections import OrderedDict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionllm.data.plain_pickle import PickleError, plain_pickle

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None)
@given(value=plain, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL), optimized=st.booleans())
def test_plain_values_of_every_protocol(value, protocol, optimized):
    content = pickle.dumps(value, protocol)
    assert plain_pickle(pickletools.optimize(content) if optimized else content) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_tuples_and_shared_values(protocol):
    shared = ["a"]
    value = {"t": (1, 2.5), "four": (1, 2, 3, 4), "empty": (), "one": (shared,), "two": [shared, shared]}
    assert plain_pickle(pickle.dumps(value, protocol)) == {
        "t": [1, 2.5], "four": [1, 2, 3, 4], "empty": [], "one": [["a"]], "two": [["a"], ["a"]],
    }  # fmt: skip


def test_what_python_2_wrote():
    """Byte strings, unicode, an int and a long, in protocols 0 and 2."""
    text = b"(lp0\n(dp1\nS'split'\np2\nS'train'\np3\nsS'raw'\nVcaf\xe9\np4\nsS'id'\nI7\nsS'big'\nL12L\nsa."
    assert plain_pickle(text) == [{"split": "train", "raw": "café", "id": 7, "big": 12}]
    binary = b"\x80\x02]q\x00}q\x01(U\x05splitq\x02U\x05trainq\x03U\x02idK\x07ua."
    assert plain_pickle(binary) == [{"split": "train", "id": 7}]


class Evil:
    """Unpickling this makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_is_refused_and_not_run(tmp_path, protocol):
    target = tmp_path / "made"
    content = pickle.dumps([{"split": "train"}, Evil(str(target))], protocol)
    with pytest.raises(
        PickleError, match=r"expected plain data, got the instruction \w*GLOBAL.* at byte \d+"
    ):
        plain_pickle(content)
    assert not target.exists()
    pickle.loads(content)  # the pickle does what it is made for
    assert target.exists()


@pytest.mark.parametrize(
    "value", [os.system, OrderedDict(a=1), Fraction(1, 2), np.int64(3), np.zeros(2), {1, 2}, b"\xff", 1j]
)
def test_other_objects_are_refused(value):
    with pytest.raises(PickleError, match="expected plain data"):
        plain_pickle(pickle.dumps([value], 4))


@pytest.mark.parametrize(
    "content",
    [
        b"(i" + b"os\nsystem\n.",  # INST
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02U\x01aQ.",  # BINPERSID
        b"P0\n.",  # PERSID
        b"]}b.",  # BUILD
        b"]]R.",  # REDUCE
        b"]]\x81.",  # NEWOBJ
        b"]0.",  # POP, which no pickler writes for plain data
    ],
)
def test_instructions_that_could_do_more_are_refused(content):
    with pytest.raises(PickleError, match="expected plain data, got the instruction"):
        plain_pickle(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "broken pickle"),
        (b".", "broken pickle at byte 0"),
        (b"]", "broken pickle"),
        (b"(.", "a mark where a value belongs"),
        (b"K\x01a.", "IndexError"),
        (b"K\x01K\x02a.", "expected a list to add to, got int"),
        (b"]K\x01K\x02s.", "expected a dict to add to, got list"),
        (b"(K\x01d.", "a key without a value"),
        (b"K\x01l.", "values without a mark"),
        (b"}]K\x01s.", "unhashable"),
        (b"h\x00.", "KeyError"),
        (b"\x8b\xff\xff\xff\x7f1.", "broken pickle|expected plain data"),
        (b"X\xff\xff\xff\x7fabc.", "broken pickle"),
    ],
)
def test_broken_pickles(content, message):
    with pytest.raises(PickleError, match=message):
        plain_pickle(content)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=40), st.data())
def test_any_bytes_are_survived(noise, data):
    whole = pickle.dumps([{"a": [1, 2.0, "x"], "b": None}], data.draw(st.integers(0, 5)))
    at = data.draw(st.integers(0, len(whole)))
    for content in (noise, whole[:at], whole[:at] + noise + whole[at:]):
        try:
            plain_pickle(content)
        except PickleError:
            pass
