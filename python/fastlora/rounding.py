""":class:`Rounding`: what merging an adapter into a weight that is stored again in fewer bits cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rounding:
    """Of a layer, where W' = W + its change was wanted and Q(W') is stored. Norms are Frobenius's."""

    name: str  # the layer's, "" where only one is spoken of
    of_weight: float  # |Q(W') - W'| / |W'|
    of_change: float  # |Q(W') - W'| / |W' - W|: from 1 on, the rounding is larger than what was learnt


def rounding(name: str, base: Tensor, wanted: Tensor, stored: Tensor) -> Rounding:
    """Of float32 matrices W, W' and Q(W'), of which the first and the last are overwritten."""
    off, change = stored.sub_(wanted).norm().item(), base.sub_(wanted).norm().item()
    return Rounding(name, _ratio(off, wanted.norm().item()), _ratio(off, change))


def _ratio(a: float, b: float) -> float:
    return 0.0 if not a else math.inf if not b else a / b
