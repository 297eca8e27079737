"""What becomes of each layer under :func:`fastlora.patch`, or why it stays as it is. Changes nothing."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

from torch import nn

from .. import checks
from ..conversion_report import SkippedLayer
from .patch_report import PatchedLayer, PatchReport

Classes = list[tuple[nn.Module, type[nn.Module]]]

_DENSE = "adapter added in place"
_ONE = "base and adapter in one product"
_REPACKED = ", scales in bfloat16 as bitsandbytes' evaluation left them"
_STRADDLING = ", blocks across rows (which bitsandbytes misreads on a CPU)"


class _Base(NamedTuple):
    """What a frozen layer is, and the class it is to have."""

    kind: str
    cls: type[nn.Module]
    note: str = ""


class _Left(Exception):
    """Why a layer stays as it is."""


def plan(model: nn.Module) -> tuple[PatchReport, Classes]:
    """The report, and the class that each layer is to have."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    report = PatchReport()
    classes: Classes = []
    told: set[int] = set()  # bases, of which their layer's line speaks
    for name, module in model.named_modules():
        if id(module) in told:
            continue
        try:
            if isinstance(module, BaseTunerLayer):
                classes += _lora(name, module, report, told)
            elif _is_4_bit(module):
                classes += _alone(name, module, report)
        except _Left as why:
            report.skipped.append(SkippedLayer(name, str(why)))
    return report, classes


def is_patched(module: nn.Module) -> bool:
    """Whether a layer has one of the classes that :func:`plan` gives."""
    return "stock" in type(module).__dict__ and type(module).__module__.startswith(f"{__package__}.")


# --- a layer with adapters, and one without ---------------------------------------------------------------


def _lora(name: str, layer: Any, report: PatchReport, told: set[int]) -> Classes:
    from .peft_layer import FusedLoraLayer

    frozen = layer.base_layer
    if isinstance(layer, FusedLoraLayer):
        told.add(id(frozen))
        _left("over a QLinear, where it is fused already")
    if is_patched(layer):
        told.add(id(frozen))
        _left("already patched")
    cls = _lora_class(layer)
    told.add(id(frozen))
    base = _base(frozen)
    adapters = {one: int(layer.r[one]) for one in layer.lora_A}
    variants = {one: layer.lora_variant[one] for one in adapters if one in layer.lora_variant}
    kinds = ", ".join(sorted({type(one).__name__.removesuffix("LinearVariant") for one in variants.values()}))
    does = _DENSE if base.kind == "dense" else _ONE
    if variants and len(variants) == len(adapters):
        if base.kind == "dense":
            _left(f"its base is dense, and its adapters are {kinds}")
        does = "base fused"
    does += (f", {kinds} by PEFT" if kinds else "") + base.note
    report.patched.append(
        PatchedLayer(name, base.kind, frozen.out_features, frozen.in_features, adapters, does)
    )
    return [(layer, cls), (frozen, base.cls)]


def _alone(name: str, layer: Any, report: PatchReport) -> Classes:
    if is_patched(layer):
        _left("already patched")
    base = _base(layer)
    report.patched.append(
        PatchedLayer(name, base.kind, layer.out_features, layer.in_features, {}, "fused" + base.note)
    )
    return [(layer, base.cls)]


def _lora_class(layer: Any) -> type[nn.Module]:
    """The class that a tuner's layer is to have."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear

    cls = type(layer)
    fused: type[nn.Module]
    if not isinstance(layer, LoraLayer):
        _left(f"a {cls.__name__} of {cls.__module__}, which is not LoRA")
    if cls is Linear:
        from .peft_fused_layers import FusedLinear as fused
    elif (cls.__module__, cls.__name__) == ("peft.tuners.lora.bnb", "Linear4bit"):
        from .peft_bitsandbytes import FusedLoraLinear4bit as fused
    else:
        _left(f"PEFT's {cls.__name__}, which computes in its own way")
    if getattr(layer, "fan_in_fan_out", False):
        _left("its base's weight is transposed (fan_in_fan_out)")
    _check_forward(layer)
    return fused


def _base(layer: Any) -> _Base:
    cls = type(layer)
    _check_forward(layer)
    if cls is nn.Linear:
        if layer.weight.dtype not in checks.DTYPE_CODE:
            _left(f"its base is {layer.weight.dtype}")
        return _Base("dense", cls)
    if _is_4_bit(layer):
        from .peft_bitsandbytes import fused_class, is_repacked, why_not

        fused = fused_class(layer)
        if fused is not None:
            reason = why_not(layer)
            if reason is not None:
                _left(reason)
            note = _REPACKED if is_repacked(layer) else ""
            straddles = layer.in_features % layer.weight.quant_state.blocksize
            return _Base("bitsandbytes", fused, note + (_STRADDLING if straddles else ""))
    _left(f"a {cls.__name__}, which computes in its own way")


def _is_4_bit(module: nn.Module) -> bool:
    """Whether a layer is bitsandbytes', or was: its linear ones, of 8 bits too."""
    return isinstance(module, nn.Linear) and (
        type(module).__module__ == "bitsandbytes.nn.modules" or is_patched(module)
    )


def _check_forward(module: Any) -> None:
    if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__:
        _left("somebody has replaced its forward")


def _left(why: str) -> NoReturn:
    raise _Left(why)
