"""DoRA: a weight's direction learns by LoRA, the length of each of its rows by itself.

    y = (m/n)·(W·x + s·B·A·x) + bias     n_i = |row i of W + s·B·A|, a constant to gradients; at first m = n

The factor m/n scales the fused product's columns. The norm never sees W + s·B·A:

    n_i² = |w_i|² + 2s·b_i·(W·Aᵀ)_i + s²·b_i·(A·Aᵀ)·b_iᵀ           w_i, b_i: row i of W and of B

The first term is a constant, summed tile by tile when a weight is first seen; W·Aᵀ is the fused kernel with A
for its r rows of x; the rest is r by r. So a training call costs r more rows of x, where PEFT dequantises all
of W and adds all of B·A to it; other calls keep m/n, and the kernel multiplies by it before it rounds y. The
price is cancellation: n_i² is within a few float32 roundings of the sum of the three terms' magnitudes, not
of itself. That matters to rows that the adapter all but erases, and to no other.

Dropout, as in the paper's own code and in PEFT, is of all that the factor scales, relative to the base: the
base sees x once more, and what was dropped of it is added back with factor 1.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024; the constant norm is its section 4.3.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..autograd import linear_from_parts
from ..checks import Packed
from ..named_adapters import DEFAULT, Parts
from ..tiles import row_tiles
from .one_adapter import OneAdapter


def dora_linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    factor: Tensor,
    seen: Tensor | None = None,
) -> Tensor:
    """factor * (x·Wᵀ + scaling·x·Aᵀ·Bᵀ) + bias, in x's dtype.

    factor: m/n (n,), float. seen: x after dropout; the base then also sees the rest of x, with factor 1.
    Where no gradient is wanted the kernel itself multiplies, before it rounds. Else m's gradient needs what
    is multiplied, so that it has to be in memory anyway.
    """
    learns = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, bias, lora_a, lora_b, factor)
    )
    if seen is None and not learns:
        return linear_from_parts(x, weight, bias, lora_a, lora_b, scaling, gain=factor.float())
    y = linear_from_parts(x if seen is None else seen, weight, None, lora_a, lora_b, scaling)
    y = (y * factor).to(y.dtype)
    if seen is not None:
        return y + linear_from_parts(x - seen, weight, bias, None, None, 0.0)
    return y if bias is None else y + bias.to(y.dtype)


@torch.no_grad()
def row_norms(weight: Packed, squares: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """|row i of W + scaling·B·A|: float32 (n,). squares: |row i of W|² (n,)."""
    a, b = lora_a.float(), lora_b.float()
    with_a = torch.ops.fastlora.nf4_linear(a, *weight[:4], None, None, None, 0.0, weight[4])  # A·Wᵀ (r, n)
    cross = (b * with_a.t()).sum(1)
    with nullcontext() if a.is_meta else torch.autocast(a.device.type, enabled=False):
        change = ((b @ (a @ a.t())) * b).sum(1)
    squared = squares + 2 * scaling * cross + scaling**2 * change
    return squared.clamp(min=torch.finfo(torch.float32).tiny).sqrt()  # an empty row has magnitude 0, not NaN


def squared_rows(weight: Packed, in_features: int) -> Tensor:
    """|row i of W|² (n,) in float32, a tile of W in memory at a time."""
    return torch.cat([tile.square().sum(1) for _, tile in row_tiles(weight, in_features)])


class RowSquares:
    """squared_rows of one layer, kept until its weight is another tensor or is written to. A compiled graph
    computes them itself."""

    def __init__(self) -> None:
        self._seen: list[tuple[weakref.ref[Tensor], int, int]] = []
        self._value: Tensor | None = None

    @torch.no_grad()
    def of(self, weight: Packed, in_features: int) -> Tensor:
        parts = [part for part in (*weight[:3], weight[4]) if part is not None]
        if torch.compiler.is_compiling() or any(part.is_inference() for part in parts):
            return squared_rows(weight, in_features)
        same = len(parts) == len(self._seen) and all(
            ref() is part and version == part._version and address == part.data_ptr()
            for part, (ref, version, address) in zip(parts, self._seen, strict=True)
        )
        if self._value is None or not same:
            with torch.inference_mode(False):
                self._value = squared_rows(weight, in_features)
            self._seen = [(weakref.ref(part), part._version, part.data_ptr()) for part in parts]
        return self._value

    def __reduce__(self) -> Any:  # a copy, or what was pickled, has other tensors
        return RowSquares, ()


class Factor:
    """m/n of one layer. Where m does not learn it is computed once for all calls with the same weight, A, B
    and m; these are compared, as writing to `.data` leaves no trace."""

    def __init__(self) -> None:
        self.squares = RowSquares()
        self._seen: tuple[Any, ...] = ()
        self._value: Tensor | None = None

    def of(
        self, weight: Packed, in_features: int, lora_a: Tensor, lora_b: Tensor, m: Tensor, scaling: float
    ) -> Tensor:
        """(n,), differentiable in m."""
        squares = self.squares.of(weight, in_features)
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and m.requires_grad) or m.is_meta:
            return m / row_norms(weight, squares, lora_a, lora_b, scaling)
        now = (lora_a, lora_b, m)
        if self._value is None or not self._same(squares, scaling, now):
            with torch.inference_mode(False), torch.no_grad():
                a, b, magnitude = (t.detach().clone() for t in now)
                self._value = magnitude / row_norms(weight, squares, a, b, scaling)
                self._seen = (squares, scaling, a, b, magnitude)
        return self._value

    def _same(self, squares: Tensor, scaling: float, now: tuple[Tensor, ...]) -> bool:
        seen_squares, seen_scaling, *kept = self._seen
        return (
            seen_squares is squares
            and seen_scaling == scaling
            and all(
                old.dtype == new.dtype and old.device == new.device and torch.equal(old, new)
                for old, new in zip(kept, now, strict=True)
            )
        )

    def __reduce__(self) -> Any:
        return Factor, ()


class DoraQLinear(OneAdapter):
    """QLinear with DoRA: beside lora_A and lora_B a parameter ``lora_magnitude_vector`` ``(n,)``, m.

    Arguments as for :class:`QLinear`; made by ``DoraQLinear.from_linear`` and by
    ``convert(model, layer_class=DoraQLinear)``. It starts equal to its base, with every `init` at W + s·B·A.
    Files are PEFT's, with ``use_dora``.
    """

    lora_magnitude_vector: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any) -> None:
        super().__init__(in_features, out_features, bias, **options)
        self._factor = Factor()
        m = None if self.lora_A is None else nn.Parameter(self.lora_A.new_empty(out_features))
        self.register_parameter("lora_magnitude_vector", m)
        if not self.weight.is_meta:
            self.reset_magnitude()

    def row_norms(self) -> Tensor:
        """n: float32 (out_features,)."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        weight = self.packed_weight()
        squares = self._factor.squares.of(weight, self.in_features)
        return row_norms(weight, squares, self.lora_A, self.lora_B, self.scaling)

    def reset_magnitude(self) -> None:
        """m = n, so that the layer is plain LoRA with its present A and B."""
        m = self._parameters.get("lora_magnitude_vector")
        if m is not None:
            with torch.no_grad():
                m.copy_(self.row_norms())

    def reset_adapter(self, init: str = "default") -> None:
        super().reset_adapter(init)
        self.reset_magnitude()

    def set_adapter_values(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Copy values (rank, k) and (n, rank) into the adapter; m = n."""
        super().set_adapter_values(lora_a, lora_b)
        self.reset_magnitude()

    def adapted(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        a, b, m = self.lora_A, self.lora_B, self.lora_magnitude_vector
        assert a is not None
        assert b is not None
        assert m is not None
        factor = self._factor.of(weight, self.in_features, a, b, m, self.scaling)
        seen = F.dropout(x, self.dropout) if self.dropout and self.training else None
        return dora_linear(x, weight, bias, a, b, self.scaling, factor, seen)

    def merged_weight(self) -> Tensor:
        """(m/n)·(W + s·B·A): float32 (n, k)."""
        dense = super().merged_weight()
        if self.merged or self.active_adapter is None or self.lora_magnitude_vector is None:
            return dense
        norm = torch.linalg.vector_norm(dense, dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        return dense.mul_((self.lora_magnitude_vector.detach() / norm)[:, None])

    def adapter(self, name: str) -> Parts:
        return super().adapter(name)._replace(magnitude=self.lora_magnitude_vector)

    def adapter_parameters(self, name: str = DEFAULT) -> list[nn.Parameter]:
        m = self._parameters["lora_magnitude_vector"]
        return super().adapter_parameters(name) + ([] if m is None else [m])
