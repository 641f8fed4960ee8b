"""NumPy's arrays in a pickle, read without NumPy's own constructors.

Those trust what a pickle tells them: a dtype of objects makes the file's bytes into pointers. Here stand-ins take their
place, and an array is made of bytes and one of a few dtypes only when all of it is there.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

#: Kind and bytes of the numbers that are read.
_CODES = ("b1", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8")


class PickledDtype:
    """Stands for `numpy.dtype`: a code and the order of bytes; all else in a pickled dtype is left alone."""

    def __init__(self, code: Any, *_: Any) -> None:
        """As NumPy pickles it: `dtype("f4", False, True)`."""
        self.code = str(code)
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        """The second entry is the order of bytes."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
            self.order = state[1]

    def of_numbers(self) -> np.dtype[Any] | None:
        """The dtype, or None for one of anything but numbers."""
        return np.dtype(f"{self.order}{self.code}") if self.code in _CODES else None


class PickledArray:
    """Stands for `numpy.ndarray`.

    Attributes:
        value: The array, in this machine's order of bytes; None for one of anything but numbers.
        kind: What it holds, for messages.
    """

    def __init__(self, *_: Any) -> None:
        """Empty until its state comes."""
        self.value: np.ndarray[Any, Any] | None = None
        self.kind = "nothing"

    def __setstate__(self, state: Any) -> None:
        """As NumPy pickles it: version, shape, dtype, whether in Fortran's order, bytes."""
        shape, dtype, fortran, content = state[-4:]
        self._set(content, dtype, shape, "F" if fortran else "C")

    @classmethod
    def of_buffer(cls, content: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
        """As NumPy pickles it with protocol 5."""
        array = cls()
        array._set(content, dtype, shape, order)
        return array

    @classmethod
    def of_scalar(cls, dtype: Any, content: Any = b"") -> PickledArray:
        """A single number."""
        return cls.of_buffer(content, dtype, (), "C")

    def _set(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
        if not isinstance(dtype, PickledDtype):
            raise pickle.UnpicklingError(f"expected an array's dtype, got {type(dtype).__name__}")
        self.kind = dtype.code
        numbers = dtype.of_numbers()
        if numbers is None:
            return
        if isinstance(content, str):  # as Python 2 wrote bytes
            content = content.encode("latin1")
        if not isinstance(content, (bytes, bytearray)):
            raise pickle.UnpicklingError(f"expected an array's bytes, got {type(content).__name__}")
        array = np.frombuffer(content, numbers).reshape(shape, order=order)
        self.value = array.astype(numbers.newbyteorder("="))


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"expected bytes as latin1, got {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


#: All that a pickle of arrays may name, under the names of NumPy 1; NumPy 2 writes `numpy._core`.
_GLOBALS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
    "numpy.ndarray": PickledArray,
    "numpy.dtype": PickledDtype,
    "numpy.core.multiarray._reconstruct": PickledArray,
    "numpy.core.multiarray.scalar": PickledArray.of_scalar,
    "numpy.core.numeric._frombuffer": PickledArray.of_buffer,
}


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays, as `PickledArray`, and Python's own containers; any other class or function is an error."""

    def find_class(self, module: str, name: str) -> Any:
        """The few callables that an array is put together by."""
        try:
            return _GLOBALS[f"{module.replace('numpy._core', 'numpy.core')}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}") from None


def array_globals_of_torch() -> list[Any]:
    """The same for `torch.serialization.safe_globals`."""
    return [
        (function, name.replace("numpy.core", core))
        for name, function in _GLOBALS.items()
        for core in ("numpy.core", "numpy._core")
        if name.startswith("numpy.")
    ]
