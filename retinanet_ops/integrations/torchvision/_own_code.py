"""Checks that code which an accelerated model does not run is torchvision's own.

An accelerated model computes what certain methods and functions of torchvision compute, without calling them. If a
client has overridden, wrapped or patched one of them, the client's code would be ignored silently.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torchvision.ops import boxes

import retinanet_ops as ops

#: Submodules in which wrappers keep the module that they call: those of `torch.compile`, of torch's
#: `checkpoint_wrapper`, of FSDP, and of `DataParallel` and its relatives.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")
_REMEDY = "undo the change, or use the model without accelerate()"


#: Names of functions that are called from one module, or of methods of a base class that an override calls. Function
#: objects would not do: a client may have replaced them before this package was imported.
Functions = tuple[ModuleType | type, tuple[str, ...]]

#: What the IoU of boxes is computed with, and the filtering of detections.
BOX_IOU: Functions = (boxes, ("box_iou", "_box_inter_union"))
BATCHED_NMS: Functions = (boxes, ("batched_nms", "nms", "_batched_nms_coordinate_trick", "_batched_nms_vanilla"))
CLIPPING: Functions = (boxes, ("clip_boxes_to_image",))


class Bypassed(NamedTuple):
    """Code of torchvision that an accelerated model does not run in one of its modes."""

    methods: tuple[tuple[str, Any, tuple[str, ...]], ...]  # path in the model, class that defines them, method names
    functions: tuple[Functions, ...]  # module that calls them, names of functions of torchvision


class BypassedByMode(NamedTuple):
    """Code of torchvision that the accelerated models of a family do not run."""

    owner: type[nn.Module]  # torchvision's class, whose `forward` is bypassed in both modes
    training: Bypassed
    evaluation: Bypassed


def check_model(model: nn.Module, bypassed: BypassedByMode, *, model_name: str = "model") -> None:
    """Raise ValueError if a model that shall be accelerated overrides what would be bypassed in one of its modes."""
    of_forward = Bypassed(methods=(("", bypassed.owner, ("forward",)),), functions=())
    check_own_code(model, of_forward, missing=False, model_name=model_name)
    for of_mode in (bypassed.training, bypassed.evaluation):
        check_own_code(model, of_mode, missing=True, model_name=model_name)


def check_call(model: Any, bypassed: BypassedByMode, *, model_name: str = "model") -> None:
    """Raise ValueError if something that a call of an accelerated model bypasses was overridden since `accelerate`."""
    check_class(model._original, bypassed.owner, model_name=model_name)
    of_mode = bypassed.training if model.training else bypassed.evaluation
    check_own_code(model, of_mode, missing=False, model_name=model_name)


def check_own_code(model: nn.Module, bypassed: Bypassed, *, missing: bool, model_name: str = "model") -> None:
    """Raise ValueError if a method or function that would be bypassed is not torchvision's own.

    Our own function in the place of torchvision's is accepted. `missing` tells whether a method may be missing. Models
    that only detect need no method for losses. Messages call the model `model_name`.
    """
    for path, owner, methods in bypassed.methods:
        part = _part(model, path)
        for method in methods:
            holder = unwrap(part, method)
            if not is_own(holder, method, owner) and (_has(holder, method) or not missing):
                where = f"{model_name}.{path}.{method}" if path else f"{model_name}.{method}"
                raise _override_error(where, method, owner, _source(holder, method, owner))
    for module, names in bypassed.functions:
        for name in names:
            got = getattr(module, name)
            ours = getattr(ops, name, None)
            if (ours is None or got is not ours) and not _is_torchvisions(got, name):
                or_ours = f" or retinanet_ops.{name}" if ours else ""
                raise ValueError(
                    f"accelerate: {module.__name__}.{name} must be torchvision's own{or_ours}, because it would be "
                    f"bypassed, got another function; {_REMEDY}"
                )


def _is_torchvisions(function: Any, name: str) -> bool:
    """Return whether torchvision defines this function under this name."""
    # `functools.wraps` copies `__module__`, so only the globals tell where a function was written.
    if _module_of(function).startswith("torch.jit."):
        function = function.__wrapped__  # torchvision scripts some functions, in a wrapper of PyTorch
    return getattr(function, "__name__", "") == name and _module_of(function).startswith("torchvision.")


def _module_of(function: Any) -> str:
    """Return the name of the module in which a function was written."""
    name: str = getattr(function, "__globals__", {}).get("__name__", "")
    return name


def check_class(own: type, owner: type, method: str = "forward", *, model_name: str = "model") -> None:
    """Raise ValueError if a model's own class, of which a method would be bypassed, does not have that of `owner`."""
    if not _is_own_in_class(own, method, owner):
        raise _override_error(f"{model_name}.{method}", method, owner, _source_in_class(own, method, owner))


def is_own(part: Any, method: str, owner: Any) -> bool:
    """Return whether the method of this object is the one that `owner` defines, not overridden and not patched."""
    return method not in _set_on(part) and _is_own_in_class(type(part), method, owner)


def runs_as_written(module: Any, owner: Any) -> bool:
    """Return whether calling the module runs torchvision's `forward` and nothing else, such as hooks."""
    watched = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl")
    return (
        is_own(module, "forward", owner)
        and type(module).__call__ is nn.Module.__call__
        and not any(getattr(module, name) for name in watched)
        and not _has_any_global_hook()
    )


def unwrap(part: Any, name: str) -> Any:
    """Return the object itself if it has the attribute, else the module inside its wrappers that has it.

    The innermost module is returned if none has it.
    """
    while isinstance(part, nn.Module) and not _has(part, name):
        inner = next((part._modules[wrapped] for wrapped in _WRAPPED if part._modules.get(wrapped) is not None), None)
        if inner is None:
            break
        part = inner
    return part


def _part(model: nn.Module, path: str) -> Any:
    """Return the part of a model at a path, such as `head.box_coder`, or None if there is none."""
    part: Any = model
    for name in path.split(".") if path else ():
        part = getattr(unwrap(part, name), name, None)
    return part


def _has(part: Any, name: str) -> bool:
    """Return whether an object has an attribute without asking its `__getattr__`, by which wrappers forward."""
    return name in _set_on(part) or name in getattr(part, "_modules", ()) or hasattr(type(part), name)


def _set_on(part: Any) -> Iterable[str]:
    """Return the names of the attributes set on the object itself."""
    return getattr(part, "__dict__", ())


def _is_own_in_class(cls: type, method: str, owner: Any) -> bool:
    return getattr(cls, method, None) is getattr(owner, method) and not _is_patched(owner, method)


def _is_patched(owner: Any, method: str) -> bool:
    """Return whether the method of a class was replaced by a function that was written in another module."""
    return _module_of(getattr(owner, method)) != owner.__module__


def _source(part: Any, method: str, owner: Any) -> str:
    """Return in words where the method of an object comes from."""
    if not _has(part, method):
        return f"{type(part).__name__} without such a method"
    return "an attribute set on the object" if method in _set_on(part) else _source_in_class(type(part), method, owner)


def _source_in_class(cls: type, method: str, owner: Any) -> str:
    return f"a function patched into {owner.__name__}" if _is_patched(owner, method) else f"that of {cls.__name__}"


def _override_error(where: str, method: str, owner: Any, source: str) -> ValueError:
    return ValueError(
        f"accelerate: {where} must be torchvision's own {owner.__name__}.{method}, which would be bypassed, got "
        f"{source}; {_REMEDY}"
    )
