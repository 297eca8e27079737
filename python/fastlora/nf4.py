"""The NF4 format: :func:`quantize_nf4` and the :class:`NF4Weight` it returns.

NF4 (Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023) stores each weight as one of 16
values between -1 and 1, times the largest magnitude of its block. Blocks run over the flattened tensor. The
bits are bitsandbytes' wherever those are well defined; csrc/include/fastlora/nf4.h has the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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

    Raises ValueError, TypeError or RuntimeError (devices) when the parts do not fit together.
    """

    packed: Tensor
    scales: Tensor
    nested: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int = 64

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
            (self._packed_2d, self.scales, self.nested, self.blocksize),
            *self._rows_cols,
            self.device,
        )

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
    def absmax(self) -> Tensor:
        """Every block's scale, decoded: float32 ``(ceil(numel / blocksize),)``."""
        return torch.ops.fastlora.nf4_decode_absmax(self.scales, self.nested)

    def numel(self) -> int:
        """Weights represented (not bytes stored)."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes and scales."""
        return self.packed.nbytes + self.scales.nbytes + (0 if self.nested is None else self.nested.nbytes)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight, scales included (0.0 for an empty tensor)."""
        return 8 * self.nbytes / self.numel() if self.numel() else 0.0

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """code * absmax in float32, rounded once to `dtype` (default: the original). Shape `self.shape`."""
        flat = torch.ops.fastlora.nf4_dequantize(
            self._packed_2d, self.scales, self.nested, self.shape[-1], self.blocksize, dtype or self.dtype
        )
        return flat.reshape(self.shape)

    def to(self, device: torch.device | str | int) -> NF4Weight:
        """The same bits on another device."""
        device = torch.device(device)
        nested = None if self.nested is None else self.nested.to(device)
        return NF4Weight(
            self.packed.to(device), self.scales.to(device), nested, self.shape, self.dtype, self.blocksize
        )

    def __eq__(self, other: object) -> bool:
        """Whether all stored bits, the shape, the dtype and the block size agree (the device may differ)."""
        if not isinstance(other, NF4Weight):
            return NotImplemented
        return (
            (self.shape, self.dtype, self.blocksize) == (other.shape, other.dtype, other.blocksize)
            and _same_bits(self.packed, other.packed)
            and _same_bits(self.scales, other.scales)
            and _same_bits(self.nested, other.nested)
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
    weight: Tensor, *, blocksize: int = 64, double_quant: bool = True, check_finite: bool = True
) -> NF4Weight:
    """Quantise a tensor to 4-bit NormalFloat.

    Args:
        weight: float32, bfloat16 or float16; any shape of at least one dimension, any number of elements,
            contiguous or not. It is not changed, and no gradient flows.
        blocksize: weights that share one scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        double_quant: store the scales in 8 bits (0.127 bits a weight at blocksize 64, instead of 0.5).
        check_finite: look for NaN and Inf. On a CUDA device that waits for the kernel, and a CUDA graph
            cannot capture it; without it a weight that holds one gives an unspecified result.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: a 0-dimensional tensor, another block size, or NaN or Inf in the weight (the message says
            how many and where the first is).
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"quantize_nf4: expected a torch.Tensor, got {type(weight).__name__}")
    weight = weight.detach()
    packed, scales, nested = torch.ops.fastlora.nf4_quantize(weight, blocksize, double_quant, check_finite)
    return NF4Weight(packed, scales, nested if double_quant else None, weight.shape, weight.dtype, blocksize)
