"""The classes that accelerated models have, and how copies and files of such models keep them."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

from torch import nn


class Accelerated:
    """First base of every accelerated class. The next one is a detector.

    A subclass of it overrides `forward`, or other methods, for one family of detectors. `accelerated_class` joins such
    a subclass with the class that a model had before.
    """

    _original: type[nn.Module]
    #: The overridden methods.
    _methods: tuple[str, ...] = ("forward",)
    #: The name of the model in messages.
    _name = "model"

    def __init_subclass__(cls) -> None:
        # Do not run the hook of the model's own class, which may register subclasses as new models.
        pass

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, and warn if that may end the acceleration."""
        if name in self._methods and not _wraps(value, getattr(type(self), name)):
            warnings.warn(
                f"accelerate: {self._name}.{name} was replaced. The model is no longer accelerated, unless the new "
                f"function calls the former {self._name}.{name}. Undo with `del {self._name}.{name}`.",
                stacklevel=2,
            )
        if name == "__class__" and not issubclass(value, Accelerated):
            warnings.warn(
                f"accelerate: the class of the model was replaced by {value.__name__}, so it is no longer accelerated. "
                "Call accelerate() again, or restore() to end the acceleration without this warning.",
                stacklevel=2,
            )
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle and copy cannot find a class made at run time, so they store the model's own class and make it again.
        if "_original" not in vars(type(self)):
            return super().__reduce_ex__(protocol)
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *state = reduced
        own = [self._original if a is type(self) else a for a in arguments]
        return (rebuild, (type(self).__bases__[0], function, *own), *state)

    def __prepare_scriptable__(self) -> nn.Module:
        """Return the model for `torch.jit.script` to compile, with torchvision's `forward`."""
        model: nn.Module = set_original_class(copy.copy(self))
        # `torch.jit.script` then replaces parts of the copy in this dict, which must not be that of the model.
        vars(model)["_modules"] = dict(model._modules)
        return model


#: The accelerated class for each pair of a base and a model's own class seen so far.
_CLASSES: dict[tuple[type, type], Any] = {}


def accelerated_class(base: type[Accelerated], own: type[nn.Module]) -> Any:
    """Return the class of a model that has the `forward` of `base` and everything else of its own class."""
    if (base, own) not in _CLASSES:
        entries = {"__module__": __name__, "_original": own}
        _CLASSES[base, own] = type(f"Accelerated{own.__name__}", (base, own), entries)
    return _CLASSES[base, own]


def rebuild(base: type[Accelerated], function: Any, *arguments: Any) -> nn.Module:
    """Call the function by which pickle or copy makes an object of the original class, and set the accelerated class.

    The state of the model is restored afterwards. Files of whole models name this function and `base`, so neither may
    move to another module.
    """
    model = function(*arguments)
    model.__class__ = accelerated_class(base, type(model))
    return model


def set_original_class(model: Any) -> Any:
    """Give a model the class that it had before `accelerated_class`, and return it."""
    object.__setattr__(model, "__class__", type(model)._original)  # without the warning of `Accelerated.__setattr__`
    return model


def _wraps(function: Any, method: Any) -> bool:
    """Return whether a function is a method, bound or not, or states by `__wrapped__` that it wraps the method."""
    function = inspect.unwrap(function)
    return getattr(function, "__func__", function) is method
