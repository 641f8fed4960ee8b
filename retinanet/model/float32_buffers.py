"""Buffers that stay float32 when the weights of a model are converted to another dtype."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module whose own buffers follow it to another device, but keep their dtype under `half()` and `double()`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, kept in before.items():
            now = self._buffers[name]
            if kept is not None and now is not None and now.dtype != kept.dtype:
                self._buffers[name] = kept.to(now.device)
        return self
