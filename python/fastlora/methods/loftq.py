"""LoftQ: start an adapter with what quantisation lost.

    alternate   Q = NF4(W - s·B·A)     s·B·A = the nearest matrix of rank r to W - Q        from B·A = 0

so that Q + s·B·A is closer to W than NF4(W) is, where LoRA starts at NF4(W) itself. One alternation leaves
the base the plain NF4(W); each further one moves base and adapter towards each other.

Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..nf4 import NF4Weight, quantize_nf4
from .low_rank import balanced, truncated_svd, widened


@torch.no_grad()
def loftq(
    weight: Tensor,
    rank: int,
    *,
    scaling: float = 1.0,
    iterations: int = 1,
    blocksize: int = 64,
    double_quant: bool = True,
    quantized: NF4Weight | None = None,
) -> tuple[NF4Weight, Tensor, Tensor]:
    """The base and adapter that LoftQ starts with.

    Args:
        weight: dense (n, k), floating.
        scaling: the factor of B·A in the layer, not 0; PEFT's LoftQ takes it for 1.
        iterations: alternations, at least 1.
        quantized: NF4(weight), if it is there already. Its offsets, where it has some, stay what they are.

    Returns Q, and A (rank, k) and B (n, rank) in float32. Raises ValueError for iterations and scaling.
    """
    if iterations < 1:
        raise ValueError(f"loftq: expected iterations >= 1, got {iterations}")
    if not scaling:
        raise ValueError("loftq: expected a scaling other than 0, got 0")
    form: dict[str, Any] = {"blocksize": blocksize, "double_quant": double_quant}
    base = quantize_nf4(weight, **form) if quantized is None else quantized
    form["offsets"] = base.offset_values
    weight = weight.float()
    a, b = balanced(*truncated_svd(weight - base.dequantize(torch.float32), rank))
    for _ in range(iterations - 1):
        base = quantize_nf4(weight.addmm(b, a, alpha=-1), **form)
        a, b = balanced(*truncated_svd(weight - base.dequantize(torch.float32), rank))
    return base, *widened(a, b / scaling, rank)
