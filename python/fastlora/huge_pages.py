"""Pages of 2 MiB for what the CPU kernels stream: packed weights and pools of adapters.

A core that reads a weight from memory waits at the end of every 4 KiB page for the address of the next. What
fastlora allocates asks for huge pages by itself, before it is written. What a loader, ``.to()`` or a copy
allocated did not; :func:`use_huge_pages` moves it. Linux gives them where its setting
``/sys/kernel/mm/transparent_hugepage/enabled`` is ``madvise`` (the usual) or ``always``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import _C
from .sharded import is_sharded


def prefer(t: Tensor) -> Tensor:
    """Ask for huge pages under a tensor that is to be written; returns it. No effect on what is no plain CPU
    tensor, or too small to span a page."""
    if type(t) is Tensor and t.device.type == "cpu" and t.is_contiguous():
        _C.prefer_huge_pages(t.data_ptr(), t.nbytes, False)
    return t


def frozen_bytes(shape: Sequence[int], device: torch.device | str | int | None) -> nn.Parameter:
    """An uninitialised uint8 Parameter for a packed weight or its scales, in huge pages where it can be."""
    return nn.Parameter(prefer(torch.empty(*shape, dtype=torch.uint8, device=device)), requires_grad=False)


def use_huge_pages(module: nn.Module) -> int:
    """Move the packed weights (uint8 parameters) and adapter tables of a model on a CPU into huge pages.

    For a model that was loaded, moved or copied; one that fastlora quantised itself has them already. The
    tensors keep their addresses and their bits. Returns the bytes that lie in huge pages now: 0 where the
    system gives none.
    """
    tensors = [p for p in module.parameters() if p.dtype is torch.uint8]
    for one in module.modules():
        table = getattr(one, "_table", None)
        tensors += [] if table is None else [*table.a, *table.b]
    with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' parameters have methods of their own
        plain = [t.data for t in tensors if t.device.type == "cpu" and not is_sharded(t)]
        unique = {t.data_ptr(): t.nbytes for t in plain if t.data_ptr()}
    return sum(_C.prefer_huge_pages(place, size, True) for place, size in unique.items())
