"""The NF4 format: :func:`quantize_nf4` and the :class:`NF4Weight` it returns.

NF4 (Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023) stores each weight as one of 16
values between -1 and 1, times the largest magnitude of its block. Blocks run over the flattened tensor. The
bits are bitsandbytes' wherever those are well defined; csrc/include/fastlora/nf4.h has the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from . import checks, ops  # noqa: F401  (ops registers torch.ops.fastlora)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False, repr=False)
class NF4Weight:
    """A tensor of `shape` packed to 4 bits a weight.

    Attributes:
        packed: uint8 ``(*shape[:-1], ceil(shape[-1] / 2))``, two codes a byte, the even column in the high
            nibble; an odd row ends with code 7 (zero).
        scales: uint8. With `nested` None the bytes of a float32 absmax a block, else an 8-bit index a block.
        nested: None, or the bytes (uint8) of float32 ``[offset, one scale for every 256 blocks]``.
        shape: the original shape, at least one dimension.
        dtype: the original dtype (float32, bfloat16 or float16); what :meth:`dequantize` returns.
        blocksize: weights that share one absmax: a power of two from 32 to 4096.
        offsets: None, or the bytes (uint8) of float32 ``(rows, groups)``, for a weight of rows x columns:
            what is added to the columns / groups weights of each group of a row. `methods/qa_lora.py` and
            `methods/icq.py` make them.

    Raises ValueError, TypeError or RuntimeError (devices) when the parts do not fit together.
    """

    packed: Tensor
    scales: Tensor
    nested: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int = 64
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        if self.dtype not in _FLOATS:
            raise TypeError(f"NF4Weight: expected dtype float32, bfloat16 or float16, got {self.dtype}")
        if not self.shape:
            raise ValueError("NF4Weight: expected a shape of at least one dimension, got ()")
        want = (*self.shape[:-1], (self.shape[-1] + 1) // 2)
        if tuple(self.packed.shape) != want:
            raise ValueError(
                f"NF4Weight: expected packed of shape {want} for a weight of shape {tuple(self.shape)}, "
                f"got {tuple(self.packed.shape)}"
            )
        checks.check_weight(
            "NF4Weight",
            self.parts,
            *self._rows_cols,
            self.device,
        )

    @property
    def parts(self) -> checks.Packed:
        """As the ops take it, as a matrix of (rows, shape[-1])."""
        return self._packed_2d, self.scales, self.nested, self.blocksize, self.offsets

    @property
    def _rows_cols(self) -> tuple[int, int]:
        return prod(self.shape[:-1]), self.shape[-1]

    @property
    def _packed_2d(self) -> Tensor:
        rows, cols = self._rows_cols
        return self.packed.reshape(rows, (cols + 1) // 2)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def double_quant(self) -> bool:
        """Whether the absmax values are themselves quantised to 8 bits."""
        return self.nested is not None

    @property
    def offset_values(self) -> Tensor | None:
        """float32 ``(rows, groups)``, or None."""
        return None if self.offsets is None else as_float32(self.offsets)

    def with_offsets(self, values: Tensor | None) -> NF4Weight:
        """The same codes and scales with offsets ``(rows, groups)``, groups a divisor of ``shape[-1]``."""
        return replace(self, offsets=None if values is None else offset_bytes(values))

    @property
    def absmax(self) -> Tensor:
        """Every block's scale, decoded: float32 ``(ceil(numel / blocksize),)``."""
        return torch.ops.fastlora.nf4_decode_absmax(self.scales, self.nested)

    def numel(self) -> int:
        """Weights represented (not bytes stored)."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and offsets."""
        stored = (self.packed, self.scales, self.nested, self.offsets)
        return sum(part.nbytes for part in stored if part is not None)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight, scales included (0.0 for an empty tensor)."""
        return 8 * self.nbytes / self.numel() if self.numel() else 0.0

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """code * absmax (+ offset) in float32, rounded once to `dtype` (default: the original). Shape
        `self.shape`."""
        packed, scales, nested, blocksize, offsets = self.parts
        flat = torch.ops.fastlora.nf4_dequantize(
            packed, scales, nested, self.shape[-1], blocksize, dtype or self.dtype, offsets
        )
        return flat.reshape(self.shape)

    def to(self, device: torch.device | str | int) -> NF4Weight:
        """The same bits on another device."""
        device = torch.device(device)
        nested, offsets = (None if t is None else t.to(device) for t in (self.nested, self.offsets))
        packed, scales = self.packed.to(device), self.scales.to(device)
        return replace(self, packed=packed, scales=scales, nested=nested, offsets=offsets)

    def __eq__(self, other: object) -> bool:
        """Whether all stored bits, the shape, the dtype and the block size agree (the device may differ)."""
        if not isinstance(other, NF4Weight):
            return NotImplemented
        return (
            (self.shape, self.dtype, self.blocksize) == (other.shape, other.dtype, other.blocksize)
            and _same_bits(self.packed, other.packed)
            and _same_bits(self.scales, other.scales)
            and _same_bits(self.nested, other.nested)
            and _same_bits(self.offsets, other.offsets)
        )

    __hash__ = None  # type: ignore[assignment]  # compares by content

    def __repr__(self) -> str:
        return (
            f"NF4Weight(shape={tuple(self.shape)}, dtype={self.dtype}, blocksize={self.blocksize}, "
            f"double_quant={self.double_quant}, device='{self.device}', "
            f"{self.bits_per_weight:.3f} bits/weight, {self.nbytes:,} bytes)"
        )

    @classmethod
    def from_bitsandbytes(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> NF4Weight:
        """Read one weight from a bitsandbytes state dict, to the same dequantised bits.

        Args:
            tensors: a state dict, or the contents of a checkpoint file.
            prefix: the layer's name (``"model.layers.0.mlp.up_proj"``, with or without a final dot, ``""``
                for a layer's own state dict); or, ending in ``weight``, the weight's own key.

        Double-quantised scales are kept as they are, unless the file uses another 8-bit map or another second
        block size than 256: then the absmax values are decoded to float32, which loses nothing.
        The result shares memory with `tensors` where the bytes are the same.

        Raises:
            ValueError: FP4 codes; missing tensors or wrong sizes (all are listed); unreadable metadata.
            TypeError: an original dtype other than float32, bfloat16, float16.
        """
        from .nf4_bitsandbytes import read

        return cls(*read(tensors, prefix))

    def to_bitsandbytes(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors bitsandbytes would save for this weight, keyed as in :meth:`from_bitsandbytes`."""
        from .nf4_bitsandbytes import write

        return write(self, prefix)


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b.to(a.device))


def quantize_nf4(
    weight: Tensor,
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    check_finite: bool = True,
    offsets: Tensor | None = None,
) -> NF4Weight:
    """Quantise a tensor to 4-bit NormalFloat.

    Args:
        weight: float32, bfloat16 or float16; any shape of at least one dimension, any number of elements,
            contiguous or not. It is not changed, and no gradient flows.
        blocksize: weights that share one scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        double_quant: store the scales in 8 bits (0.127 bits a weight at blocksize 64, instead of 0.5).
        check_finite: look for NaN and Inf. On a CUDA device that waits for the kernel, and a CUDA graph
            cannot capture it; without it a weight that holds one gives an unspecified result.
        offsets: None, or floating ``(rows, groups)`` for a weight of rows x columns, groups a divisor of the
            columns: what is taken off each group's weights before they are quantised, and added again by
            whoever computes with the result.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: a 0-dimensional tensor, another block size, or NaN or Inf in the weight (the message says
            how many and where the first is).
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"quantize_nf4: expected a torch.Tensor, got {type(weight).__name__}")
    weight = weight.detach()
    shape, dtype = weight.shape, weight.dtype
    if offsets is not None:
        checks.check_float("quantize_nf4", "offsets", offsets)
        rows, columns = prod(shape[:-1]), shape[-1] if shape else 0
        groups = offsets.shape[-1] if offsets.dim() == 2 else 0
        if not groups or offsets.shape[0] != rows or columns % groups:
            raise ValueError(
                f"quantize_nf4: expected offsets of shape ({rows}, groups), groups a divisor of {columns}, "
                f"got {tuple(offsets.shape)}"
            )
        offsets = offsets.detach().float()
        weight = (weight.reshape(rows, groups, -1).float() - offsets[:, :, None]).reshape(shape)
    packed, scales, nested = torch.ops.fastlora.nf4_quantize(weight, blocksize, double_quant, check_finite)
    stored = None if offsets is None else offset_bytes(offsets)
    return NF4Weight(packed, scales, nested if double_quant else None, shape, dtype, blocksize, stored)


def offset_bytes(values: Tensor) -> Tensor:
    """Offsets (rows, groups) as they are stored: uint8 (rows, 4 * groups)."""
    return values.detach().float().contiguous().view(torch.uint8)


def as_float32(stored: Tensor) -> Tensor:
    """The bytes of float32 values as those; a copy where they do not lie on a boundary of 4."""
    stored = stored.contiguous()
    return (stored.clone() if stored.storage_offset() % 4 else stored).view(torch.float32)
