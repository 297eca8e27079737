"""The nearest matrix of low rank, in the float32 that all initialisations and merges share."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_svd(matrix: Tensor, rank: int, niter: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a float matrix (n, k) and their vectors.

    Args:
        rank: how many, at least 1; of a smaller matrix as many as it has.
        niter: None for the whole decomposition; else how many times random vectors are passed through the
            matrix (Halko et al., 2009): much faster where rank is far below n and k, and approximate.

    Returns U (n, r), s (r,) and Vᵀ (r, k), s descending: matrix ≈ U·diag(s)·Vᵀ.
    """
    if niter is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    u, s, v = torch.svd_lowrank(matrix, min(rank, *matrix.shape), niter=niter)
    return u, s, v.T


def balanced(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """(A (r, k), B (n, r)) with B·A = U·diag(s)·Vᵀ, a root of s in each."""
    root = s.sqrt()
    return root[:, None] * vh, u * root


def widened(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of this rank with the same product: zeros where a small matrix had fewer singular values."""
    missing = rank - a.shape[0]
    if not missing:
        return a, b
    return torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), missing)], 1)
