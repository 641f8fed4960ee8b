"""Errors of memory that could not be allocated, on any device."""

from __future__ import annotations

_PHRASES = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory could not be allocated."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PHRASES)
