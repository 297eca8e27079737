"""How a layer may start, by name: what ``init=`` of QLinear.from_linear and convert means to the adapter, and
``calibrate=`` to the base."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..nf4 import NF4Weight, quantize_nf4
from .icq import quantize_icq
from .loftq import loftq
from .pissa import pissa

#: Those that look at the weight, so that base and adapter belong together.
_FROM_WEIGHT = re.compile(r"(loftq|pissa)(?:_niter_([1-9]\d*))?")


def reads_weight(init: str) -> bool:
    """Whether the adapter, and maybe the base, depend on the dense weight."""
    return _FROM_WEIGHT.fullmatch(init) is not None


def check_init(op: str, init: str, rank: int, alpha: float) -> None:
    """ValueError for a name that there is not, and for a rank or alpha that it cannot start with."""
    if not isinstance(init, str) or not (init in {"default", "gaussian"} or reads_weight(init)):
        raise ValueError(
            f"{op}: expected init 'default', 'gaussian', 'loftq', 'loftq_niter_N', 'pissa' or "
            f"'pissa_niter_N', got {init!r}"
        )
    if reads_weight(init) and not (rank and alpha > 0):
        raise ValueError(f"{op}: expected rank >= 1 and alpha > 0 for init {init!r}, got {rank} and {alpha}")


def check_calibrate(op: str, calibrate: str | None, in_features: int, blocksize: int) -> None:
    """ValueError for a name that there is not, and for columns that it cannot calibrate."""
    if calibrate not in {None, "icq"}:
        raise ValueError(f"{op}: expected calibrate None or 'icq', got {calibrate!r}")
    if calibrate is not None and in_features % blocksize:
        raise ValueError(
            f"{op}: expected in_features that are whole blocks of {blocksize} for calibrate {calibrate!r}, "
            f"got {in_features}"
        )


def start(
    init: str,
    dense: Tensor,
    rank: int,
    scaling: float,
    blocksize: int,
    double_quant: bool,
    calibrate: str | None = None,
) -> tuple[NF4Weight, tuple[Tensor, Tensor] | None]:
    """The base in NF4 and, for an `init` that reads the weight, lora_A (r, k) and lora_B (n, r) in float32.
    Raises ValueError if `dense` holds NaN or Inf."""
    dense = dense.detach()
    match = _FROM_WEIGHT.fullmatch(init)
    quantize = quantize_nf4 if calibrate is None else quantize_icq
    if match is None:
        return quantize(dense, blocksize=blocksize, double_quant=double_quant), None
    kind, times = match[1], None if match[2] is None else int(match[2])
    if kind == "loftq":
        base, a, b = loftq(
            dense,
            rank,
            scaling=scaling,
            iterations=times or 1,
            blocksize=blocksize,
            double_quant=double_quant,
            quantized=quantize(dense, blocksize=blocksize, double_quant=double_quant),
        )
        return base, (a, b)
    if not torch.isfinite(dense).all():  # the decomposition would fail less clearly
        quantize_nf4(dense)
    rest, a, b = pissa(dense, rank, scaling=scaling, niter=times)
    return quantize(rest, blocksize=blocksize, double_quant=double_quant), (a, b)
