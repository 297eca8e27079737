""":func:`patch`: a PEFT model's LoRA layers computed by fused kernels, in place and reversibly.

Layers are given another class, a subclass of the one they have: the modules, their parameters and names, the
configuration, optimisers and hooks over them are untouched, and :func:`unpatch` gives the classes back.
"""

from __future__ import annotations

import sys
from importlib import metadata
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

from .. import checks
from ..conversion_report import SkippedLayer
from ..linear import QLinear
from .operands import FusedBase
from .patch_report import PatchedLayer, PatchReport

#: The oldest versions that have what is used here.
OLDEST = {"peft": (0, 17), "bitsandbytes": (0, 45)}


class _Base(NamedTuple):
    """What a layer's frozen half is, and the class it is to have."""

    kind: str
    cls: type
    note: str = ""


def patch(model: nn.Module, *, show: bool = True) -> PatchReport:
    """Let a PEFT model's LoRA layers compute with fused kernels, in place. :func:`unpatch` undoes it.

    Args:
        model: any module that holds LoRA layers of PEFT: over bitsandbytes' 4-bit layers in NF4, over
            :class:`QLinear`, or over ``torch.nn.Linear``. 4-bit layers without an adapter are taken too.
        show: print the report as a table.

    Losses are the unpatched model's within rounding, except that dropout draws other masks, of the same
    distribution. All of PEFT goes on working: merging, several adapters, ``adapter_names``, hotswapping,
    saving and loading. Layers that PEFT adds later are patched by another call. No weight is copied.

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
    report = PatchReport()
    swaps: list[tuple[nn.Module, type]] = []
    bases: set[int] = set()
    for name, module in model.named_modules():
        if id(module) not in bases:
            swaps += _plan(name, module, bases, report)
    if not report.patched and not report.skipped:
        raise ValueError(
            "patch: expected a model with LoRA layers of PEFT or 4-bit layers of bitsandbytes, got a "
            f"{type(model).__name__} without any"
        )
    for module, cls in swaps:
        _set_class(module, cls)
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
        if _is_patched(module):
            _set_class(module, type(module).__dict__["stock"])
            module.__dict__.pop("_kept", None)
            count += 1
    return count


def _set_class(module: nn.Module, cls: type) -> None:
    before = type(module).forward
    module.__class__ = cls
    # accelerate's hooks are a forward of the object's own, which calls the class's from here.
    held: Any = module.__dict__.get("_old_forward")
    if getattr(held, "__func__", None) is before:
        module._old_forward = MethodType(cls.forward, module)  # type: ignore[attr-defined]
    if issubclass(cls, FusedBase):
        cls.prepare(module)


def _is_patched(module: nn.Module) -> bool:
    return "stock" in type(module).__dict__ and type(module).__module__.startswith(__package__)


# --- what becomes of a module -----------------------------------------------------------------------------


def _plan(name: str, module: nn.Module, bases: set[int], report: PatchReport) -> list[tuple[nn.Module, type]]:
    """The classes that a module, and the base under it, are to have. Adds to the report, and to the bases that
    belong to a layer; changes nothing else."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, BaseTunerLayer):
        layer: Any = module
        cls = _lora_class(layer)
        base = _base(layer.base_layer) if isinstance(cls, type) else cls
        reason = cls if isinstance(cls, str) else base if isinstance(base, str) else None
        if reason is None and base.kind == "dense" and layer.lora_A and _variants(layer) >= set(layer.lora_A):
            reason = f"its base is dense, and its adapters are {_names(layer)}"
        if reason is not None:
            report.skipped.append(SkippedLayer(name, reason))
            if (isinstance(base, str) and not isinstance(cls, str)) or _is_patched(module):
                bases.add(id(layer.base_layer))  # this line speaks of it too
            return []
        bases.add(id(layer.base_layer))
        adapters = {one: int(layer.r[one]) for one in layer.lora_A}
        report.patched.append(_patched(name, layer.base_layer, base, adapters, _does(layer, base)))
        return [(module, cls), (layer.base_layer, base.cls)]
    if not type(module).__module__.startswith(("bitsandbytes.", __package__)):
        return []
    if not isinstance(module, nn.Linear):
        return []
    base = _base(module)
    if _is_patched(module) or isinstance(base, str):
        reason = base if isinstance(base, str) else "already patched"
        report.skipped.append(SkippedLayer(name, reason))
        return []
    report.patched.append(_patched(name, module, base, {}, "fused" + base.note))
    return [(module, base.cls)]


def _patched(name: str, linear: Any, base: _Base, adapters: dict[str, int], does: str) -> PatchedLayer:
    return PatchedLayer(name, base.kind, linear.out_features, linear.in_features, adapters, does)


def _lora_class(layer: Any) -> type | str:
    """The class that a tuner's layer is to have, or why it keeps its own."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora import layer as peft_lora

    cls = type(layer)
    if _is_patched(layer):
        return "already patched"
    if not isinstance(layer, LoraLayer):
        return f"a {cls.__name__} of {cls.__module__}, which is not LoRA"
    fused: type | None = None
    if cls is peft_lora.Linear:
        from .peft_fused_layers import FusedLinear as fused
    elif cls.__module__ == "peft.tuners.lora.bnb" and cls.__name__ == "Linear4bit":
        from .peft_bitsandbytes import FusedLoraLinear4bit as fused
    if fused is None:
        return f"PEFT's {cls.__name__}, which computes in its own way"
    if getattr(layer, "fan_in_fan_out", False):
        return "its base's weight is transposed (fan_in_fan_out)"
    return _replaced_forward(layer) or fused


def _base(base: nn.Module) -> _Base | str:
    """What a frozen layer is and is to be, or why it stays what it is."""
    cls = type(base)
    replaced = _replaced_forward(base)
    if replaced is not None:
        return replaced
    if cls is nn.Linear:
        dtype = base.weight.dtype
        return _Base("dense", cls) if dtype in checks.DTYPE_CODE else f"its base is {dtype}"
    if cls is QLinear:
        if base.adapter_names:
            return "its base is a QLinear with an adapter of its own"
        return _Base("QLinear", cls)
    if cls.__module__ == "bitsandbytes.nn.modules" or _is_patched(base):
        from .peft_bitsandbytes import fused_class, is_repacked, why_not

        fused = fused_class(base)
        if fused is not None:
            note = ", scales in bfloat16 as bitsandbytes' evaluation left them" if is_repacked(base) else ""
            return why_not(base) or _Base("bitsandbytes", fused, note)
    return f"its base is a {cls.__name__}, which computes in its own way"


def _replaced_forward(module: nn.Module) -> str | None:
    if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__:
        return "somebody has replaced its forward"
    return None


def _variants(layer: Any) -> set[str]:
    return set(layer.lora_variant) & set(layer.lora_A)


def _names(layer: Any) -> str:
    kinds = {type(layer.lora_variant[one]).__name__.removesuffix("LinearVariant") for one in _variants(layer)}
    return ", ".join(sorted(kinds))


def _does(layer: Any, base: _Base) -> str:
    one = (
        "torch's product, adapter added in place"
        if base.kind == "dense"
        else "base and adapter in one product"
    )
    if layer.lora_A and _variants(layer) >= set(layer.lora_A):
        one = "base fused"
    return one + (f", {_names(layer)} by PEFT" if _variants(layer) else "") + base.note


def _require(package: str) -> None:
    """ImportError unless a package is there and new enough."""
    oldest = ".".join(map(str, OLDEST[package]))
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"patch: expected {package} >= {oldest}, got no {package} installed") from None
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST[package]:
        raise ImportError(f"patch: expected {package} >= {oldest}, got {version}")
