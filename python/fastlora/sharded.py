"""DTensors, torch's tensors of which each rank holds a part: whole for a kernel, or cut like a parameter.

FSDP2 gives a module its parameters whole while its forward runs. What it wraps by itself and whose forward is
never called (an adapter that a fused layer reads) is still cut then, and is gathered here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(t: Tensor | None) -> TypeGuard[DTensor]:
    """Whether `t` is a DTensor; also where torch was built without torch.distributed."""
    return hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """All of a DTensor, without a gradient; every rank must take part. Others are returned as they are."""
    return t.full_tensor().detach() if is_sharded(t) else t


def gathered(t: Any) -> Any:
    """All of a DTensor, to compute with: its gradient is the mean of the ranks' own, as it is in FSDP2 and
    DDP, where each computes a part of the batch. Every rank must take part. Anything else is returned as it
    is."""
    if not is_sharded(t):
        return t
    from torch.distributed.tensor import Partial

    mesh = t.device_mesh
    full = t.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad and torch.is_grad_enabled():
        ranks = mesh.size()
        full.register_hook(lambda gradient: gradient / ranks)
    return full


def check_whole(op: str, weight: Tensor | None) -> None:
    """A packed weight is not gathered here: who meets it in pieces has gone past what keeps it whole."""
    if is_sharded(weight):
        raise RuntimeError(
            f"{op}: expected a whole weight, got a sharded one; call the module that fully_shard was given"
        )


def reshard(model: nn.Module) -> None:
    """Make FSDP2 let go of what it has gathered in `model`: values written there would be lost."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def cut_like(parameter: Tensor, t: Tensor) -> Tensor:
    """`t` laid out as `parameter` is: the first rank's values, where they differ."""
    if not is_sharded(parameter):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(parameter.device), parameter.device_mesh, parameter.placements)
