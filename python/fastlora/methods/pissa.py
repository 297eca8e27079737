"""PiSSA: train the principal part of a weight, freeze and quantise the rest.

    W = U·diag(σ)·Vᵀ       A = diag(√(σ_r/s))·V_rᵀ     B = U_r·diag(√(σ_r/s))     base = NF4(W - s·B·A)

with the r largest singular values. The layer starts at W but for the rounding of the rest, which is smaller
than that of W where a few directions are large. The adapter is no change to W: it belongs to this base. What
it has learnt, as an ordinary adapter of W, is "cat" of it and of the one that it started as, with weights 1
and -1 (`methods/merging.py`).

Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
2024.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .low_rank import balanced, truncated_svd, widened


@torch.no_grad()
def pissa(
    weight: Tensor, rank: int, *, scaling: float = 1.0, niter: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rest and the adapter that PiSSA starts with.

    Args:
        weight: dense (n, k), floating.
        scaling: the factor of B·A in the layer, above 0.
        niter: as for :func:`fastlora.methods.low_rank.truncated_svd`; PEFT's ``"pissa_niter_N"``.

    Returns W - scaling·B·A (n, k), A (rank, k) and B (n, rank), all float32. Raises ValueError for a scaling.
    """
    if not scaling > 0:
        raise ValueError(f"pissa: expected a scaling above 0, got {scaling}")
    weight = weight.float()
    u, s, vh = truncated_svd(weight, rank, niter)
    a, b = balanced(u, s / scaling, vh)
    return weight.addmm(b, a, alpha=-scaling), *widened(a, b, rank)
