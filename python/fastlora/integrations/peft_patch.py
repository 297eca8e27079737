""":func:`patch`: a PEFT model's LoRA layers computed by fused kernels, in place and reversibly.

Layers are given another class, a subclass of the one they have: the modules, their parameters and names, the
configuration, optimisers and hooks over them are untouched, and :func:`unpatch` gives the classes back.
"""

from __future__ import annotations

import sys
from importlib import metadata
from types import MethodType
from typing import Any

from torch import nn

from ..huge_pages import use_huge_pages
from .operands import FusedBase
from .patch_plan import is_patched, plan
from .patch_report import PatchReport
from .versions import numbers, text

#: The oldest versions that have what is used here.
OLDEST = {"peft": (0, 20), "bitsandbytes": (0, 45)}


def patch(model: nn.Module, *, show: bool = True) -> PatchReport:
    """Let a PEFT model's LoRA layers compute with fused kernels, in place. :func:`unpatch` undoes it.

    Args:
        model: any module that holds LoRA layers of PEFT: over bitsandbytes' 4-bit layers in NF4, or over
            ``torch.nn.Linear``. 4-bit layers without an adapter are taken too. Those over a :class:`QLinear`
            are fused as PEFT makes them.
        show: print the report as a table.

    Losses are the unpatched model's within rounding, except that dropout draws other masks, of the same
    distribution. All of PEFT goes on working: merging, several adapters, ``adapter_names``, hotswapping,
    saving and loading. Layers that PEFT adds later are patched by another call. No weight is copied; on a
    CPU they are moved into pages of 2 MiB where they lie (:func:`fastlora.use_huge_pages`).

    Weights that bitsandbytes' evaluation on a CPU has repacked are laid out as they were; the report says so.

    Returns what was done, and for each layer that was left, why. Raises TypeError if `model` is no module,
    ValueError if it holds nothing that could be patched, ImportError without a PEFT (and, where the model
    needs it, a bitsandbytes) that is new enough.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: expected a torch.nn.Module, got {type(model).__name__}")
    _require("peft")
    if "bitsandbytes" in sys.modules:
        _require("bitsandbytes")
    report, classes = plan(model)
    if not report.patched and not report.skipped:
        raise ValueError(
            "patch: expected a model with LoRA layers of PEFT or 4-bit layers of bitsandbytes, got a "
            f"{type(model).__name__} without any"
        )
    for module, cls in classes:
        _set_class(module, cls)
    use_huge_pages(model)
    if show:
        from rich.console import Console

        Console().print(report)
    return report


def unpatch(model: nn.Module) -> int:
    """Give every layer that :func:`patch` changed the class back that it had. Returns how many there were (0
    is no error). Raises TypeError if `model` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: expected a torch.nn.Module, got {type(model).__name__}")
    count = 0
    for module in model.modules():
        if is_patched(module):
            _set_class(module, type(module).__dict__["stock"])
            module.__dict__.pop("_kept", None)
            count += 1
    return count


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    before = type(module).forward
    module.__class__ = cls
    # accelerate's hooks are a forward of the object's own, which calls the class's from here.
    held: Any = module.__dict__.get("_old_forward")
    if getattr(held, "__func__", None) is before:
        module.__dict__["_old_forward"] = MethodType(cls.forward, module)
    if isinstance(module, FusedBase):
        module.prepare()


def _require(package: str) -> None:
    """ImportError unless a package is there and new enough."""
    oldest = text(OLDEST[package])
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"patch: expected {package} >= {oldest}, got no {package} installed") from None
    if numbers(version) < OLDEST[package]:
        raise ImportError(f"patch: expected {package} >= {oldest}, got {version}")
