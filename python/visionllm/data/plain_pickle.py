"""Lists, dicts, text and numbers from a pickle, without running the pickle machine.

A pickle is a program: unpickling can call anything that can be imported. Data sets published as pickles need
none of that. `pickletools` (which only decodes) takes the file apart into its instructions, and of those the
ones that put plain values together are followed here; at any other (GLOBAL, REDUCE, BUILD, ...) reading stops
with an error. Pickles of all protocols can be read, Python 2's too; tuples become lists.
"""

from __future__ import annotations

import pickletools
from typing import Any

_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_GETS = frozenset(("GET", "BINGET", "LONG_BINGET"))
_MARK = object()


class PickleError(ValueError):
    """A pickle that is broken or holds more than plain data."""


def plain_pickle(content: bytes) -> Any:
    """The value in a pickle: dicts, lists, text, numbers, True, False and None.

    Raises:
        PickleError: says what stands at which byte.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    name, position = "the beginning", 0
    try:
        for opcode, argument, where in pickletools.genops(content):
            name, position = opcode.name, where or 0
            if name in _VALUES:
                stack.append(argument)
            elif name in _PUTS:
                memo[argument] = _top(stack)
            elif name in _GETS:
                stack.append(memo[argument])
            elif name == "MEMOIZE":
                memo[len(memo)] = _top(stack)
            elif name == "MARK":
                stack.append(_MARK)
            elif name == "APPENDS":
                values = _since_mark(stack)
                _list(stack).extend(values)
            elif name == "SETITEMS":
                values = _since_mark(stack)
                _dict(stack).update(_pairs(values))
            elif name == "APPEND":
                value = _pop(stack)
                _list(stack).append(value)
            elif name == "SETITEM":
                value, key = _pop(stack), _pop(stack)
                _dict(stack)[key] = value
            elif name in ("EMPTY_LIST", "EMPTY_TUPLE"):
                stack.append([])
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name in ("LIST", "TUPLE"):
                stack.append(_since_mark(stack))
            elif name == "DICT":
                stack.append(dict(_pairs(_since_mark(stack))))
            elif name in _TUPLES:
                stack.append([_pop(stack) for _ in range(_TUPLES[name])][::-1])
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name == "STOP":
                return _pop(stack)
            elif name not in ("PROTO", "FRAME"):
                detail = "" if argument is None else f" {str(argument)[:60]!r}"
                raise PickleError(
                    f"expected plain data, got the instruction {name}{detail} at byte {position}"
                )
    except PickleError:
        raise
    except Exception as error:  # noqa: BLE001 - of what pickletools, int() and dict() raise on broken input
        message = f"{type(error).__name__}: {error}"
        raise PickleError(f"broken pickle at byte {position} ({name}): {message[:200]}") from error
    raise PickleError("broken pickle: no end")


def _pop(stack: list[Any]) -> Any:
    value = stack.pop()
    if value is _MARK:
        raise ValueError("a mark where a value belongs")
    return value


def _top(stack: list[Any]) -> Any:
    if stack[-1] is _MARK:
        raise ValueError("a mark where a value belongs")
    return stack[-1]


def _list(stack: list[Any]) -> list[Any]:
    if not isinstance(stack[-1], list):
        raise TypeError(f"expected a list to add to, got {type(stack[-1]).__name__}")
    return stack[-1]


def _dict(stack: list[Any]) -> dict[Any, Any]:
    if not isinstance(stack[-1], dict):
        raise TypeError(f"expected a dict to add to, got {type(stack[-1]).__name__}")
    return stack[-1]


def _since_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1
    while stack[at] is not _MARK:
        at -= 1
        if at < 0:
            raise ValueError("values without a mark before them")
    values = stack[at + 1 :]
    del stack[at:]
    return values


def _pairs(values: list[Any]) -> list[tuple[Any, Any]]:
    if len(values) % 2:
        raise ValueError("a key without a value")
    return list(zip(values[::2], values[1::2], strict=True))
