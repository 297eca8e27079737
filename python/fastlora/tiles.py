"""A packed weight a few rows at a time: what is computed from all of W without W in memory."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

from .checks import Packed

#: Elements of a tile, about: 4 MiB in float32, within the caches of a core or two.
TILE = 2**20


def row_tiles(weight: Packed, in_features: int, elements: int = TILE) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a matrix (n, in_features), in order: (which, their values in float32).

    A tile has about `elements` of them, and ends where a scale block does, which may take up to `blocksize`
    rows. Raises nothing of its own.
    """
    packed, scales, nested, blocksize, offsets = weight
    n = packed.shape[0]
    absmax = torch.ops.fastlora.nf4_decode_absmax(scales, nested).view(torch.uint8)
    whole = blocksize // gcd(in_features, blocksize)  # the fewest rows that are whole blocks
    step = whole * max(1, elements // (in_features * whole))
    blocks = step * in_features // blocksize
    for i, first in enumerate(range(0, n, step)):
        rows = slice(first, min(first + step, n))
        tile = torch.ops.fastlora.nf4_dequantize(
            packed[rows],
            absmax[4 * i * blocks : 4 * (i + 1) * blocks],
            None,
            in_features,
            blocksize,
            torch.float32,
            None if offsets is None else offsets[rows],
        )
        yield rows, tile
