"""Quantisers for :class:`ModuLinear`: the protocol, and three.

A quantiser turns a weight into tensors and gives rows of it back. It knows nothing of adapters, gradients or
modules, and one object may serve all layers of a model. What is of one layer is in its tensors; what is of
all (a group size) is in the object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks
from ..autograd import linear_from_parts
from ..nf4 import quantize_nf4
from ..reference import nf4_pack, nf4_unpack
from ..tiles import TILE, nf4_rows, rows_of_whole_blocks, slabs

#: A quantised weight as its quantiser made it: tensors of any shapes and dtypes, by name.
Stored: TypeAlias = Mapping[str, Tensor]
Shape: TypeAlias = tuple[int, int]


@runtime_checkable
class Quantizer(Protocol):
    """What a layer asks of a weight's format. Derive from it: only :meth:`dequantize` has to be written, and
    :meth:`quantize` where weights are to be quantised here rather than come quantised. No method changes the
    parts."""

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts of a floating matrix (n, k), on its device. Their names are identifiers."""
        raise NotImplementedError(
            f"{type(self).__name__}.quantize: expected a quantiser that quantises, got one that only "
            "dequantises; give ModuLinear the parts"
        )

    def dequantize(self, parts: Stored, shape: Shape, rows: slice, dtype: torch.dtype) -> Tensor:
        """Rows of a weight of `shape` (n, k) in `dtype`: (rows.stop - rows.start, k), 0 <= start < stop <= n.
        No gradient is asked of it, and autocast is off."""
        ...

    def row_step(self, shape: Shape) -> int:
        """`rows` begin at multiples of it. For a format that gives the whole matrix or nothing, n."""
        return 1

    def linear(
        self,
        x: Tensor,
        parts: Stored,
        shape: Shape,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: float,
        dropout: float,
    ) -> Tensor | None:
        """The whole differentiable layer, where the format has a kernel for it; None where W is dequantised
        in slabs instead. bias is in x's dtype; all arguments are as for :func:`fastlora.nf4_linear`."""
        return None


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix of `shape` (n, k) as `quantizer` holds it."""

    quantizer: Quantizer
    parts: Stored
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(part.nbytes for part in self.parts.values())

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows, which begin at a multiple of the quantiser's `row_step`. Raises ValueError where the
        quantiser gives something else."""
        got = self.quantizer.dequantize(self.parts, self.shape, rows, dtype)
        want = (rows.stop - rows.start, self.shape[1])
        if got.shape != want or got.dtype != dtype:
            raise ValueError(
                f"{type(self.quantizer).__name__}.dequantize: expected {want} of {dtype} for rows "
                f"{rows.start} to {rows.stop}, got {tuple(got.shape)} of {got.dtype}"
            )
        return got

    def slabs(self, dtype: torch.dtype, elements: int = TILE) -> Iterator[tuple[slice, Tensor]]:
        """All rows in order, about `elements` elements at a time: (which, their values)."""
        for rows in slabs(*self.shape, self.quantizer.row_step(self.shape), elements):
            yield rows, self.rows(rows, dtype)

    def dequantize(self, dtype: torch.dtype, elements: int = TILE) -> Tensor:
        """The dense matrix, written a slab at a time."""
        device = next(iter(self.parts.values())).device
        dense = torch.empty(self.shape, dtype=dtype, device=device)
        for rows, slab in self.slabs(dtype, elements):
            dense[rows] = slab
        return dense


# --- those that there are ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class NF4(Quantizer):
    """4-bit NormalFloat on the fused kernels, as in :class:`QLinear` (Dettmers et al., 2023): 4.127 bits a
    weight. `blocksize` and `double_quant` as for :func:`fastlora.quantize_nf4`."""

    blocksize: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        checks.check_blocksize("NF4", self.blocksize)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        made = quantize_nf4(weight, blocksize=self.blocksize, double_quant=self.double_quant)
        parts = {"packed": made.packed, "scales": made.scales}
        return parts if made.nested is None else parts | {"nested": made.nested}

    def row_step(self, shape: Shape) -> int:
        return rows_of_whole_blocks(shape[1], self.blocksize)

    def dequantize(self, parts: Stored, shape: Shape, rows: slice, dtype: torch.dtype) -> Tensor:
        absmax = torch.ops.fastlora.nf4_decode_absmax(parts["scales"], parts.get("nested")).view(torch.uint8)
        return nf4_rows(parts["packed"], absmax, shape[1], self.blocksize, rows, dtype)

    def linear(
        self,
        x: Tensor,
        parts: Stored,
        shape: Shape,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: float,
        dropout: float,
    ) -> Tensor | None:
        weight = (parts["packed"], parts["scales"], parts.get("nested"), self.blocksize, None)
        return linear_from_parts(x, weight, bias, lora_a, lora_b, scaling, dropout)


@dataclass(frozen=True)
class Int8(Quantizer):
    """Symmetric 8-bit integers, a float32 scale a row, rounded to nearest: w = scale·code, |code| <= 127, and
    off by scale / 2 at most, scale being the row's largest magnitude / 127. 8 + 32/k bits a weight."""

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        w = _checked("Int8", weight)
        scales = w.abs().amax(1, keepdim=True) / 127
        codes = (w / _divisors(scales)).round_().clamp_(-127, 127).to(torch.int8)
        return {"codes": codes, "scales": scales}

    def dequantize(self, parts: Stored, shape: Shape, rows: slice, dtype: torch.dtype) -> Tensor:
        return (parts["codes"][rows] * parts["scales"][rows]).to(dtype)


@dataclass(frozen=True)
class Int4(Quantizer):
    """Affine 4-bit integers in groups of `group_size` columns of a row, rounded to nearest: w = scale·(code -
    zero), code and zero from 0 to 15, and off by scale / 2 at most, scale being (max(w, 0) - min(w, 0)) / 15
    over the group. A zero stays zero. 4 + 40/group_size bits a weight."""

    group_size: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise ValueError(f"Int4: expected group_size >= 1 as an int, got {self.group_size!r}")

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        w = self._groups(_checked("Int4", weight))
        low, high = w.amin(-1, keepdim=True).clamp_(max=0), w.amax(-1, keepdim=True).clamp_(min=0)
        scales = high / 15 - low / 15  # their difference may be no float32
        divisors = _divisors(scales)
        zeros = (low / divisors).round_().neg_()
        codes = (w / divisors).round_().add_(zeros).clamp_(0, 15).to(torch.uint8)
        return {
            "codes": nf4_pack(codes.flatten(1)[:, : weight.shape[1]]),
            "zeros": zeros.squeeze(-1).to(torch.uint8),
            "scales": scales.squeeze(-1),
        }

    def dequantize(self, parts: Stored, shape: Shape, rows: slice, dtype: torch.dtype) -> Tensor:
        codes = self._groups(nf4_unpack(parts["codes"][rows], shape[1]).float())
        w = codes.sub_(parts["zeros"][rows, :, None]).mul_(parts["scales"][rows, :, None])
        return w.flatten(1)[:, : shape[1]].to(dtype)

    def _groups(self, w: Tensor) -> Tensor:
        """(n, groups, group_size) of (n, k), zeros after the end of a row."""
        return F.pad(w, (0, -w.shape[1] % self.group_size)).unflatten(1, (-1, self.group_size))


def _checked(op: str, weight: Tensor) -> Tensor:
    """In float32."""
    if not weight.is_meta and not torch.isfinite(weight).all():
        checks.raise_not_finite(op, weight)
    return weight.detach().float()


def _divisors(scales: Tensor) -> Tensor:
    """The scales; 1 where all that is divided is 0."""
    return torch.where(scales > 0, scales, 1.0)
