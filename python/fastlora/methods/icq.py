"""ICQ: each block is quantised about an offset that has its codes say as much as they can.

    τ₀ = the median of a block     a = max |w - τ₀|     τ = τ₀ + f·a     w ≈ code·absmax + τ

f is the one of 2n + 1 even steps from -λσ to λσ, σ = 1 / Φ⁻¹(0.9677) = 0.541, whose codes have the largest
entropy: that of the histogram of the block's 64 codes over their 16 values. Of equals the first. A block is
64 weights of a row, so that in_features has to be a multiple of the block size, and its offset is one of
in_features / 64 groups. What that costs: 0.5 bits a weight.

The authors store τ in 8 bits, with a second level of scales; here it is float32, as offsets are.

The search quantises nothing. A block's weights are sorted once; the codes about τ change at the 15 midpoints
of NF4, that is at absmax·midpoint + τ, so that looking these up in the sorted weights counts every code.

Qin et al., "Accurate LoRA-Finetuning Quantization of LLMs via Information Retention" (IR-QLoRA), 2024.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from .. import checks
from ..nf4 import NF4Weight, quantize_nf4
from ..ops import nf4_codes

_SIGMA = 1 / NormalDist().inv_cdf(0.9677083)
_BLOCKS = 512  # that are searched at once: a few MiB


@torch.no_grad()
def icq_offsets(weight: Tensor, *, blocksize: int = 64, width: float = 0.1, steps: int = 100) -> Tensor:
    """τ of each block of a row of `weight` (n, k): float32 (n, k / blocksize).

    Args:
        weight: float32, bfloat16 or float16.
        blocksize: weights of a block, which divides k.
        width, steps: λ and n.

    Raises ValueError for sizes, TypeError for a dtype. Of a weight with NaN or Inf the result is unspecified.
    """
    checks.check_blocksize("icq_offsets", blocksize)
    if weight.dim() != 2 or weight.shape[1] % blocksize:
        raise ValueError(
            f"icq_offsets: expected a matrix whose columns are whole blocks of {blocksize}, got "
            f"{tuple(weight.shape)}"
        )
    checks.check_float("icq_offsets", "weight", weight)
    if width < 0 or steps < 0:
        raise ValueError(f"icq_offsets: expected width >= 0 and steps >= 0, got {width} and {steps}")
    n, k = weight.shape
    codes = nf4_codes().double()
    midpoints = ((codes[1:] + codes[:-1]) / 2).float().to(weight.device)
    factors = torch.arange(-steps, steps + 1, dtype=torch.float64) / max(steps, 1) * (width * _SIGMA)
    factors = factors.float().to(weight.device)
    # c·log2(c), the smaller the sum the larger the entropy; in integers, so that equals are equal.
    counts = torch.arange(blocksize + 1, dtype=torch.float64)
    information = (counts * counts.clamp(min=1).log2() * 2**14).round().int().to(weight.device)
    blocks = weight.detach().reshape(-1, blocksize)
    found = [_search(part, midpoints, factors, information) for part in blocks.split(_BLOCKS)]
    return torch.cat(found).reshape(n, k // blocksize)


def _search(blocks: Tensor, midpoints: Tensor, factors: Tensor, information: Tensor) -> Tensor:
    """τ (blocks,) of some blocks (blocks, blocksize)."""
    blocksize = blocks.shape[1]
    ascending = blocks.float().sort(1).values
    low, high = ascending[:, :1], ascending[:, -1:]
    median = ascending[:, (blocksize - 1) // 2, None]
    taus = median + factors * torch.maximum(high - median, median - low)  # (blocks, factors)
    absmax = torch.maximum(high - taus, taus - low)
    bounds = absmax[:, :, None] * midpoints + taus[:, :, None]
    below = torch.searchsorted(ascending, bounds.flatten(1), right=True, out_int32=True)
    below = torch.nn.functional.pad(below.view(bounds.shape), (1, 1))
    below[:, :, -1] = blocksize
    sums = information[below.diff(dim=2)].sum(2, dtype=torch.int32)
    order = torch.arange(len(factors), device=sums.device)
    first = torch.where(sums == sums.amin(1, keepdim=True), order, len(factors)).amin(1, keepdim=True)
    return taus.gather(1, first)[:, 0]


def quantize_icq(weight: Tensor, *, blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantise a matrix (n, k) to NF4 about the offsets that ICQ finds. Arguments as for
    :func:`fastlora.quantize_nf4`, which see for errors; k is a multiple of `blocksize`."""
    if not torch.isfinite(weight).all():  # it says where
        quantize_nf4(weight, blocksize=blocksize)
    offsets = icq_offsets(weight, blocksize=blocksize)
    return quantize_nf4(weight, blocksize=blocksize, double_quant=double_quant, offsets=offsets)
