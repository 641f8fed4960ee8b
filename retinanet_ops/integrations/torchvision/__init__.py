"""Adapter that runs torchvision's detectors with the matching, the losses and the post-processing of this package.

`accelerate` replaces the class of a model, or the classes of its parts, by a subclass that overrides only `forward` or
other single methods. Parameters, submodules, attributes and hooks remain the same objects, and `restore` sets the
original class again. Each family of detectors has a module of its own, and `_families.py` lists them.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, TypeVar

from torch import nn

from ._families import FAMILIES, Family, check_parts, family_of, with_parts
from ._model_class import Accelerated, accelerated_class, set_original_class

__all__ = ["accelerate", "restore"]

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Make a torchvision detector use the ops of this package for matching, losses and post-processing.

    The model is one of these, or of a subclass that does not override the bypassed methods:

    - `RetinaNet`, for example from `retinanet_resnet50_fpn` or `retinanet_resnet50_fpn_v2`
    - `SSD`, for example from `ssd300_vgg16` or `ssdlite320_mobilenet_v3_large`
    - `FCOS`, for example from `fcos_resnet50_fpn`
    - `FasterRCNN`, `MaskRCNN`, `KeypointRCNN` or any other `GeneralizedRCNN`
    - `RegionProposalNetwork` or `RoIHeads`, the parts of an R-CNN, to accelerate one of them only

    Backbone, transform, anchor generator and the `forward` of the heads may be of any kind.

    Args:
        model: The model. It is changed in place: its class is replaced by a subclass of it, and nothing else changes.
            An attribute `forward` that only repeats the method of the class is deleted.

    Returns:
        The same object. A model that is already accelerated is returned unchanged.

    Raises:
        TypeError: `model` is none of these detectors. The message names the part of `model` that is one, for example
            inside `torch.compile` or DistributedDataParallel; accelerating that part is enough. Or `rpn` or `roi_heads`
            of an R-CNN is no part of torchvision.
        ValueError: A method or function of torchvision that would be bypassed was overridden or replaced: `forward`,
            `compute_loss` or `postprocess_detections` of the model, `compute_loss` of a head, the coding of boxes, the
            matching, or a function that these call; in an R-CNN any method of `rpn` except `pre_nms_top_n` and
            `post_nms_top_n`, and `assign_targets_to_proposals` and `postprocess_detections` of `roi_heads`. The message
            names it. A replacement by the function of the same name in `retinanet_ops` is accepted. The box loss of a
            RetinaNet is unknown, or the matcher of an SSD allows low-quality matches. A change made after this call
            raises in the next `forward` that would bypass it.

    Warns:
        UserWarning: After this call, `forward` or the class of the model is replaced, so that the acceleration may end.
            In an R-CNN, `rpn` or `roi_heads` is replaced by a part that is not accelerated; call `accelerate` again.

    Inputs, outputs, state dict, `torch.save` and copies work as before. Loading a file of the whole model requires this
    package, unless the file was saved after `restore`. Attributes such as `score_thresh`, `_loss_type` and the
    matcher's thresholds are read at each call. `torch.jit.script` and `torch.jit.trace` compile torchvision's
    `forward`. A model that is built anew, for example to load a state dict, has to be accelerated anew.

    torchvision's own heads run without their permute and cat. A head that overrides `forward`, has hooks, is compiled,
    or is wrapped by `checkpoint_wrapper`, FSDP, DataParallel or the like is called, and its outputs are used.

    In an R-CNN, the classes of `rpn` and `roi_heads` are replaced as well. Its own `forward`, that of its RoI heads,
    the losses of its RoI heads, masks, keypoints and samplers stay as they are, so clients may override them. The
    samplers draw the same random numbers as without acceleration. A copy made by `copy.copy` shares both parts, and so
    their acceleration, with the model.

    Losses and detections equal torchvision's up to float32 rounding, with these exceptions:

    - In a RetinaNet and an R-CNN, a ground truth that overlaps no anchor has no positive anchors. torchvision makes
      every anchor positive.
    - In an R-CNN, an IoU within rounding of a threshold may keep or drop another proposal than in torchvision. The
      random sample of the RoI heads is then another one, too.
    - In an R-CNN, a ground truth with a NaN matches nothing. In torchvision, the losses of `rpn` are NaN.
    - An R-CNN checks targets as torchvision does. Labels that are not one per box raise ValueError. The rules for
      targets and labels that follow are those of the other detectors.
    - In an SSD, an image with too few negatives for the ratio of negatives to positives counts every negative once.
      torchvision counts positives a second time to reach the ratio.
    - In an SSD on CUDA, the last of several ground truths with the same best default box has it, as in torchvision on
      the CPU. In torchvision on CUDA, it is undefined which one has it.
    - In an FCOS, an anchor generator that makes several anchors in a cell raises ValueError. torchvision's losses then
      give the levels wrong bounds, and its detection raises.
    - In training, more targets than images raise ValueError. torchvision uses the surplus in the denominators only.
    - Targets that torchvision does not check raise ValueError or TypeError, which name the target's index and its
      entry: entries that are missing, labels that are floating or not one per box, a wrong device. torchvision raises
      an error of Python or ignores surplus labels.
    - A label outside 0..K-1 raises ValueError. torchvision's RetinaNet takes -1 as class K-1, and its FCOS as
      background. Otherwise torchvision fails with IndexError or a CUDA assertion.
    - `topk_candidates` below 1 and negative `detections_per_img` raise ValueError.
    - In half precision and under autocast, anchors, losses and detections are float32. torchvision rounds them to half
      precision. Proposals and detections of an R-CNN in half precision are rounded at the end, because RoI pooling
      needs the dtype of the maps.
    - Detections have no gradient, except those of an R-CNN. Equal scores are ordered by anchor, then by class, in an
      SSD by class, then by default box, and among the proposals of an R-CNN by level, then by anchor.
    """
    family = _family_of("accelerate", model)
    check_parts(model, family)
    plain = [(module, own) for module, own in with_parts(model, family) if not isinstance(module, Accelerated)]
    for module, own in plain:
        if vars(module).get("forward") == MethodType(type(module).forward, module):
            del module.forward  # left behind by a wrapper that was removed; it would hide the accelerated `forward`
        if own.check:
            own.check(module)
    for module, own in plain:
        module.__class__ = accelerated_class(own.forward, type(module))
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`.

    Args:
        model: The model. It is changed in place: its original class is set again.

    Returns:
        The same object. A model that is not accelerated is returned unchanged.

    Raises:
        TypeError: `model` is none of the detectors that `accelerate` takes.
        ValueError: The class of the model was changed after `accelerate`.
    """
    modules = with_parts(model, _family_of("restore", model))
    accelerated = [module for module, _ in modules if isinstance(module, Accelerated)]
    for module in accelerated:
        if "_original" not in vars(type(module)):
            raise ValueError(f"restore: model's class must be the one of accelerate(), got {type(module).__name__}")
    for module in accelerated:
        set_original_class(module)
    return model


def _family_of(function: str, model: Any) -> Family:
    """Return the family of a model; raise TypeError if it has none."""
    if family := family_of(model):
        return family
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    inside = next((f", whose {name!r} is one; pass that module" for name, module in modules if family_of(module)), "")
    names = [family.detector.__name__ for family in FAMILIES]
    known = f"{', '.join(names[:-1])} or {names[-1]}" if names[1:] else names[0]
    raise TypeError(f"{function}: model must be a torchvision {known}, got {type(model).__name__}{inside}")
