"""A weight a few rows at a time: what is computed from all of W without W in memory."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

from .checks import Packed

#: Elements of a tile, about: 4 MiB in float32, within the caches of a core or two.
TILE = 2**20


def slabs(n: int, k: int, step: int = 1, elements: int = TILE) -> Iterator[slice]:
    """The rows of a matrix (n, k) in order, about `elements` elements at a time: each slice begins at a
    multiple of `step` rows, and all but the last are as long."""
    size = step * max(1, elements // (k * step))
    return (slice(first, min(first + size, n)) for first in range(0, n, size))


def rows_of_whole_blocks(k: int, blocksize: int) -> int:
    """The fewest rows of k elements that are whole scale blocks, which run over the flattened matrix."""
    return blocksize // gcd(k, blocksize)


def row_tiles(weight: Packed, in_features: int, elements: int = TILE) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a matrix (n, in_features), in order: (which, their values in float32).

    A tile has about `elements` of them, and ends where a scale block does, which may take up to `blocksize`
    rows. Raises nothing of its own.
    """
    packed, scales, nested, blocksize, offsets = weight
    absmax = torch.ops.fastlora.nf4_decode_absmax(scales, nested).view(torch.uint8)
    step = rows_of_whole_blocks(in_features, blocksize)
    for rows in slabs(packed.shape[0], in_features, step, elements):
        tile = nf4_rows(packed, absmax, in_features, blocksize, rows, torch.float32, offsets)
        yield rows, tile


def nf4_rows(
    packed: Tensor,
    absmax: Tensor,
    in_features: int,
    blocksize: int,
    rows: slice,
    dtype: torch.dtype,
    offsets: Tensor | None = None,
) -> Tensor:
    """Rows of an NF4 matrix (n, in_features) in `dtype`; they begin where a scale block does. absmax: the
    bytes of all blocks' float32 scales."""
    blocks = slice(rows.start * in_features // blocksize, -(-rows.stop * in_features // blocksize))
    return torch.ops.fastlora.nf4_dequantize(
        packed[rows], absmax[4 * blocks.start : 4 * blocks.stop], None, in_features, blocksize, dtype,
        None if offsets is None else offsets[rows],
    )  # fmt: skip
