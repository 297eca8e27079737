"""What a layer's frozen half brings to the fused product, and when it may be asked instead of called."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from .. import _C
from ..checks import Packed

#: x in the dtype that the layer computes in, its weight, and its bias in that dtype.
Operands: TypeAlias = "tuple[Tensor, Packed, Tensor | None]"


class FusedBase(nn.Module):
    """A layer that can say what it would multiply."""

    def operands(self, x: Tensor) -> Operands | None:
        """None: it has to be called."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Called once the layer has this class."""


def operands(base: nn.Module, x: Tensor) -> Operands | None:
    """Of a FusedBase; None where it has to be called."""
    return base.operands(x) if isinstance(base, FusedBase) and not watched(base) else None


def watched(*modules: nn.Module) -> bool:
    """Whether somebody wants to see or change what goes through one of these, so that it has to be called."""
    for module in modules:
        held = module.__dict__
        if (
            held["_forward_hooks"]
            or held["_forward_pre_hooks"]
            or held["_backward_hooks"]
            or held["_backward_pre_hooks"]
            or ("forward" in held and not _only_moves_inputs(module))
        ):
            return True
    return False


def _only_moves_inputs(module: nn.Module) -> bool:
    """Whether a forward of the module's own is accelerate's that brings x to the weight's device, where the
    weight stays: nothing, where x is there already."""
    hook = module.__dict__.get("_hf_hook")
    return (
        type(hook).__name__ == "AlignDevicesHook"
        and not getattr(hook, "offload", True)
        and not getattr(hook, "io_same_device", True)
    )


def computes_on(device: torch.device) -> bool:
    """Whether this build has kernels for a device."""
    return device.type == "cpu" or (device.type == "cuda" and _C.cuda_built)
