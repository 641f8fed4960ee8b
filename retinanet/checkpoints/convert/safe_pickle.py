"""NumPy arrays from a pickle, read without NumPy's own constructors.

NumPy's constructors trust the pickle: with a dtype of objects they take the file's bytes as pointers. The classes of
this module replace the constructors. They build an array only from bytes and one of a few dtypes of numbers.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

#: Codes of the dtypes that are read: the kind of number and its size in bytes.
_CODES = ("b1", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8")


class PickledDtype:
    """A stand-in for `numpy.dtype` that keeps the code and the byte order, and ignores the rest of a pickled dtype."""

    def __init__(self, code: Any, *_: Any) -> None:
        """Take the arguments that NumPy pickles, such as `dtype("f4", False, True)`."""
        self.code = str(code)
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        """Take the byte order from the second entry of the state."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
            self.order = state[1]

    def of_numbers(self) -> np.dtype[Any] | None:
        """Return the NumPy dtype, or None if its values are not numbers."""
        return np.dtype(f"{self.order}{self.code}") if self.code in _CODES else None


class PickledArray:
    """A stand-in for `numpy.ndarray`.

    Attributes:
        value: The array, in this machine's byte order; None if its elements are not numbers.
        kind: The code of the elements' dtype, for messages.
    """

    def __init__(self, *_: Any) -> None:
        """Start empty; `__setstate__` fills the array."""
        self.value: np.ndarray[Any, Any] | None = None
        self.kind = "nothing"

    def __setstate__(self, state: Any) -> None:
        """Take the state that NumPy pickles: version, shape, dtype, whether in Fortran order, bytes."""
        shape, dtype, fortran, content = state[-4:]
        self._set(content, dtype, shape, "F" if fortran else "C")

    @classmethod
    def of_buffer(cls, content: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
        """Return an array from the arguments that NumPy pickles with protocol 5."""
        array = cls()
        array._set(content, dtype, shape, order)
        return array

    @classmethod
    def of_scalar(cls, dtype: Any, content: Any = b"") -> PickledArray:
        """Return an array without dimensions from the arguments that NumPy pickles for a scalar."""
        return cls.of_buffer(content, dtype, (), "C")

    def _set(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
        if not isinstance(dtype, PickledDtype):
            raise pickle.UnpicklingError(f"expected the dtype of an array, got {type(dtype).__name__}")
        self.kind = dtype.code
        numbers = dtype.of_numbers()
        if numbers is None:
            return
        if isinstance(content, str):  # Bytes that Python 2 wrote.
            content = content.encode("latin1")
        if not isinstance(content, (bytes, bytearray)):
            raise pickle.UnpicklingError(f"expected the bytes of an array, got {type(content).__name__}")
        array = np.frombuffer(content, numbers).reshape(shape, order=order)
        self.value = array.astype(numbers.newbyteorder("="))


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"expected bytes as latin1, got {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


#: Callables that a pickle of arrays may name. The names are those of NumPy 1; NumPy 2 writes `numpy._core`.
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
    """An unpickler of arrays, which become `PickledArray`, and Python's containers. It refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of `_GLOBALS`, and refuse any other name."""
        try:
            return _GLOBALS[f"{module.replace('numpy._core', 'numpy.core')}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}") from None


def array_globals_of_torch() -> list[Any]:
    """Return the NumPy entries of `_GLOBALS` in the form that `torch.serialization.safe_globals` takes."""
    return [
        (function, name.replace("numpy.core", core))
        for name, function in _GLOBALS.items()
        for core in ("numpy.core", "numpy._core")
        if name.startswith("numpy.")
    ]
