"""An adapter's tensors: what a table demands of them, and how Parameters come to lie over its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

#: (lora_A (r, k), lora_B (n_j, r)) of one slice of an adapter; None where the slice has none.
Pair: TypeAlias = "tuple[nn.Parameter, nn.Parameter] | None"
Given: TypeAlias = "tuple[Tensor, Tensor] | None"


class LowRank(NamedTuple):
    """A table as the ops take it, and what of it learns."""

    a: list[Tensor]  # (R_j, k), a slice each
    b: list[Tensor]  # (R_j, n_j)
    entries: Tensor  # int32 (slices, capacity, 2): {first row, rank}
    scaling: Tensor  # float32 (slices, capacity)
    widths: list[int]  # of u and v, a slice each
    parameters: list[Tensor]  # lora_A, lora_B, lora_A, ... of those that are rows of the pools and learn
    places: tuple[tuple[int, int, int], ...]  # (slice, first row, rank) of each pair
    view: Callable[[], Any] | None = None  # AdapterTable.view, of one


def check_pairs(
    op: str,
    lora_a: Tensor | Sequence[Tensor | None],
    lora_b: Tensor | Sequence[Tensor | None],
    in_features: int,
    slices: Sequence[int],
) -> list[Given]:
    """A pair for each slice, of which there is at least one."""
    many = [[t] if isinstance(t, Tensor) else list(t) for t in (lora_a, lora_b)]
    count = len(slices)
    if len(many[0]) != count or len(many[1]) != count:
        refuse(op, f"{count} lora_a and lora_b, one a slice", f"{len(many[0])} and {len(many[1])}")
    given: list[Given] = []
    for a, b, n in zip(*many, slices, strict=True):
        if a is None or b is None:
            if a is not b:
                refuse(op, "lora_a and lora_b of a slice together", "only one of them")
            given.append(None)
            continue
        for name, t in (("lora_a", a), ("lora_b", b)):
            if not t.is_floating_point():
                raise TypeError(f"AdapterTable.{op}: expected {name} of a floating dtype, got {t.dtype}")
        if a.dim() != 2 or a.shape[1] != in_features or not a.shape[0]:
            refuse(op, f"lora_a of shape (r >= 1, {in_features})", tuple(a.shape))
        if b.shape != (n, a.shape[0]):
            refuse(op, f"lora_b of shape {(n, a.shape[0])}", tuple(b.shape))
        given.append((a, b))
    if not any(given):
        refuse(op, "an adapter in at least one slice", "none")
    return given


def check_scalings(op: str, scaling: float | Sequence[float], count: int) -> list[float]:
    """One for each slice."""
    many = [float(s) for s in scaling] if isinstance(scaling, Sequence) else [float(scaling)] * count
    if len(many) != count or not all(map(math.isfinite, many)):
        refuse(op, f"a finite scaling, or {count} of them, one a slice", scaling)
    return many


def refuse(op: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"AdapterTable.{op}: expected {expected}, got {got}")


def compact(p: nn.Parameter) -> nn.Parameter:
    """A copy whose memory holds nothing else, where the parameter's holds a whole pool."""
    return nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)


def parameter_for(value: Tensor, view: Tensor) -> nn.Parameter:
    """The value itself, if it is a Parameter that can be pointed at `view`, else an empty one that can be."""
    if isinstance(value, nn.Parameter):
        if torch._has_compatible_shallow_copy_type(value, view):
            return value
        return nn.Parameter(view.new_empty(0), requires_grad=value.requires_grad)
    return nn.Parameter(view.new_empty(0), requires_grad=False)  # with a version of its own, not the pool's


def is_over(t: Tensor, view: Tensor) -> bool:
    """Whether two tensors are the same elements of memory."""
    return (t.dtype, t.device, t.shape, t.stride(), t.data_ptr()) == (
        view.dtype,
        view.device,
        view.shape,
        view.stride(),
        view.data_ptr(),
    )


def flat(pairs: Sequence[Pair]) -> list[nn.Parameter]:
    return [p for pair in pairs if pair is not None for p in pair]
