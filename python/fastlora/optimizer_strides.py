"""Fused optimisers over parameters whose strides have changed.

Torch's fused steps on a CPU walk a parameter, its gradient and its state as they lie in memory, and do not
ask whether all lie alike. A lora_B changes from rows to columns when its layer gets a second adapter, and
optimiser states are read from files that were written before. So what belongs to such a parameter is laid out
like it before a fused step. Other steps go by strides.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

_MARK = "_fastlora_strides_may_change"


def watch(parameters: Iterable[nn.Parameter]) -> None:
    """Keep what optimisers hold for these laid out as they are."""
    _install()
    for p in parameters:
        setattr(p, _MARK, True)


@cache
def _install() -> None:
    register_optimizer_step_pre_hook(_lay_out)


def _lay_out(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for group in optimizer.param_groups:
        for p in group["params"] if group.get("fused") else ():
            if hasattr(p, _MARK):
                if p.grad is not None and p.grad.stride() != p.stride():
                    p.grad = _like(p, p.grad)
                state = optimizer.state.get(p, {})
                for key, t in state.items():
                    if isinstance(t, Tensor) and t.shape == p.shape and t.stride() != p.stride():
                        state[key] = _like(p, t)


def _like(p: Tensor, t: Tensor) -> Tensor:
    return torch.empty_like(p, dtype=t.dtype, requires_grad=False).copy_(t)
