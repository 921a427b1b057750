"""A reader of pickles that holds numbers, texts and numeric numpy arrays, and that runs no code from them.

Two fences. First the opcodes are walked without executing any: kinds that such pickles do not need, more of
them than these need, lengths beyond the data and far memo slots are refused. Then the pickle is loaded by an
unpickler that knows a handful of names, each bound to a function of this file and not to numpy's; any other
name is refused before it is imported. What these functions build is counted: a pickle that names one text a
thousand times would otherwise become a thousand arrays.
"""

from __future__ import annotations

import io
import math
import pickle  # noqa: TID251  the one place: every name is resolved by `_Restricted.find_class`
import pickletools
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np

from ..columns import shown
from ..errors import StoreError

Value = np.ndarray | int | float | str

_OPCODES = frozenset(
    [
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "POP",
        "POP_MARK",
        "DUP",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "GET",
        "BINGET",
        "LONG_BINGET",
        "PUT",
        "BINPUT",
        "LONG_BINPUT",
        "MEMOIZE",
        "EMPTY_LIST",
        "LIST",
        "APPEND",
        "APPENDS",
        "GLOBAL",
        "STACK_GLOBAL",
        "REDUCE",
        "BUILD",
    ]
)
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
# Python's unpickler takes memory up to the highest memo slot that is named.
_MEMO_SLACK = 4096
_MOST_OPCODES = 1000  # an array takes some 50; each empty list takes one byte and becomes 64
_BUILT = 2  # bytes built a byte of the pickle: latin-1 text, the bytes that it stands for, the array
_BUILT_SLACK = 4096
_DTYPE = re.compile(r"[<>=|]?(?:f[248]|i[1248]|u[1248]|b1)")
_SHOWN = 80


class _Refused(Exception):
    """What is wrong with a pickle."""


class _Account:
    """Bytes that one pickle may still build."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, count: int) -> None:
        """Note bytes that are about to be built.

        Raises
        ------
        _Refused
            If they are too many.
        """
        self.left -= count
        if self.left < 0:
            raise _Refused("builds far more bytes than it holds")


_account: ContextVar[_Account] = ContextVar("_account")
"""Of the pickle that is being loaded: the unpickler calls the stand-ins below and passes nothing on."""


class _DType:
    """Stands in for `numpy.dtype`: numbers and booleans only."""

    __slots__ = ("value",)

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            shown = code[:_SHOWN] if isinstance(code, str) else type(code).__name__
            what = "object arrays are not read" if shown in ("O", "O8", "|O") else "expected numbers"
            raise _Refused(f"numpy dtype {shown!r}: {what}")
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "=", "|"):
            raise _Refused("the state of a numpy dtype is not understood")
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array:
    """Stands in for `numpy.ndarray` while it is put together."""

    __slots__ = ("value",)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refused("the state of a numpy array is not understood")
        _, shape, dtype, fortran, data = state
        self.value = _build(data, dtype, shape, "F" if fortran else "C")


class _Function:
    """A name that a pickle may use; callable, and no pickle can set its attributes."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("sets the state of a function")


def _build(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """Return an array from its bytes, after shape and size have been found to agree."""
    if not isinstance(dtype, _DType):
        raise _Refused("a numpy array has no numpy dtype")
    if isinstance(data, str):  # written by Python 2
        data = _encode(data, "latin1")
    if not isinstance(data, bytes | bytearray):
        raise _Refused(f"the data of a numpy array are a {type(data).__name__}, expected bytes")
    if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        raise _Refused("the shape of a numpy array is not understood")
    declared = math.prod(shape) * dtype.value.itemsize
    if declared != len(data):
        raise _Refused(f"a numpy array declares {float(declared):.4g} bytes and has {len(data)}")
    _account.get().take(len(data))
    # A copy may be written to, and does not keep the pickle in memory.
    return np.frombuffer(data, dtype.value).reshape(shape, order="F" if order == "F" else "C").copy()


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _Array:
        raise _Refused("an array is of a kind other than numpy.ndarray")
    return _Array()


def _scalar(dtype: Any, data: Any) -> np.ndarray:
    return _build(data, dtype, (), "C")


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _Refused("_codecs.encode is read for latin1 only")
    _account.get().take(len(text))
    return text.encode("latin-1")


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _Function(_encode),
}
for _core in ("numpy.core", "numpy._core"):
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = _Function(_reconstruct)
    _NAMES[f"{_core}.multiarray", "scalar"] = _Function(_scalar)
    _NAMES[f"{_core}.numeric", "_frombuffer"] = _Function(_build)


class _Restricted(pickle.Unpickler):
    """Resolves the names in `_NAMES` and no others; imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name of numpy."""
        try:
            return _NAMES[module, name]
        except (KeyError, TypeError):
            raise _Refused(
                f"asks for {str(module)[:_SHOWN]}.{str(name)[:_SHOWN]}, which could run code; only "
                "numeric numpy "
                "arrays, numbers and texts are read"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to outside."""
        raise _Refused("refers to an object outside of it")


def restricted_loads(data: bytes, where: str) -> Value:
    """Read a pickle of a numeric numpy array, a number or a text.

    Parameters
    ----------
    data
        The pickle, any protocol, written under numpy 1 or 2.
    where
        File and member, for the message.

    Returns
    -------
    numpy array, int, float or str

    Raises
    ------
    StoreError
        If it holds anything else, naming `where` and what was refused; nothing of it has run.
    """
    try:
        _walk(data)
        _account.set(_Account(_BUILT * len(data) + _BUILT_SLACK))
        value = _Restricted(io.BytesIO(data)).load()
    except _Refused as error:
        raise StoreError(f"{where}: refused: {error}") from None
    except MemoryError:
        raise StoreError(f"{where}: refused: needs more memory than there is") from None
    except Exception as error:  # a damaged pickle fails in any way; each is the same to the reader
        raise StoreError(f"{where}: not a readable pickle ({type(error).__name__})") from None
    if isinstance(value, _Array):
        value = getattr(value, "value", None)
    if isinstance(value, bool) or not isinstance(value, np.ndarray | int | float | str):
        raise StoreError(
            f"{where}: refused: holds a {type(value).__name__.lstrip('_')}, expected an array, a number "
            "or a text"
        )
    return value


def _walk(data: bytes) -> None:
    """Look at every opcode without executing any.

    Raises
    ------
    _Refused
        If one is of a kind that numbers, texts and arrays do not need.
    """
    last = None
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        last = opcode.name
        if count == _MOST_OPCODES:
            raise _Refused(
                f"holds more than {_MOST_OPCODES} opcodes, which numbers, texts and arrays do not need"
            )
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            _Restricted(io.BytesIO()).find_class(module, name)
        elif opcode.name not in _OPCODES:
            raise _Refused(f"holds the opcode {opcode.name}, which numbers, texts and arrays do not need")
        elif opcode.name in _PUTS and isinstance(argument, int) and argument > len(data) + _MEMO_SLACK:
            raise _Refused(f"uses memo slot {shown(argument)} in {len(data)} bytes")
    if last != "STOP":
        raise _Refused("does not end")
