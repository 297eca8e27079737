"""The operators of the optimisers (``optim.py``): one step of AdamW in one pass, in place. ``ops.py`` says
how they are made; what they compute is in ``reference.py``, to the bit in csrc/include/fastlora/adamw.h."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from . import _C, checks
from .checks import DTYPE_CODE, block_count
from .checks_segmented import check_written
from .cuda import Device
from .isa import level
from .ops import Outputs, define

#: Elements that share a scale of 8-bit moments.
BLOCKSIZE = 256
_NUMBERS = "float lr, float beta1, float beta2, float eps, float weight_decay, int step"


def _check(
    op: str, param: Tensor, grad: Tensor, step: int, moments: dict[str, Tensor], dtype: torch.dtype
) -> None:
    checks.check_float(op, "param", param)
    checks.check_float(op, "grad", grad)
    checks.check_device(op, "grad", grad, param.device)
    checks.check_shape(op, "grad", grad, tuple(param.shape), "param's")
    check_written(op, "param", param)
    if step < 1:
        raise ValueError(f"{op}: expected step from 1, got {step}")
    for name, t in moments.items():
        _check_state(op, name, t, param, dtype, tuple(param.shape))


def _check_state(
    op: str, name: str, t: Tensor, param: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if t.dtype is not dtype:
        raise TypeError(f"{op}: expected {name} in {dtype}, got {t.dtype}")
    checks.check_device(op, name, t, param.device)
    checks.check_shape(op, name, t, shape, "a param of {}", tuple(param.shape))
    check_written(op, name, t)


def _numbers(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: float
) -> tuple[float, float, float, float, float, float, float]:
    """AdamwStep, in float64 and in torch's order of operations."""
    return (
        1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, math.sqrt(1 - beta2**step), eps,
        -(lr / (1 - beta1**step)),
    )  # fmt: skip


def _adamw_outputs(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: float, beta1: float, beta2: float,
    eps: float, weight_decay: float, step: int,
) -> Outputs:  # fmt: skip
    moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    _check("adamw", param, grad, step, moments, torch.float32)
    return []


def _adamw(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: float, beta1: float, beta2: float,
    eps: float, weight_decay: float, step: int,
) -> int:  # fmt: skip
    return _C.adamw(
        param.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), param.numel(),
        DTYPE_CODE[param.dtype], DTYPE_CODE[grad.dtype],
        *_numbers(lr, beta1, beta2, eps, weight_decay, step), torch.get_num_threads(), level(),
    )  # fmt: skip


def _adamw_cuda(
    device: Device, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *numbers: float
) -> int:
    return device.call(
        "adamw", (grad,), (param, exp_avg, exp_avg_sq), param.numel(), DTYPE_CODE[param.dtype],
        DTYPE_CODE[grad.dtype], *_numbers(*numbers),
    )  # fmt: skip


define(
    f"adamw(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, {_NUMBERS}) -> ()",
    _adamw_outputs,
    _adamw,
    _adamw_cuda,
)


def _adamw_8bit_outputs(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_scale: Tensor,
    exp_avg_sq_scale: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    step: int,
) -> Outputs:  # fmt: skip
    op = "adamw_8bit"
    _check(op, param, grad, step, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, torch.uint8)
    blocks = (block_count(param.numel(), BLOCKSIZE),)
    for name, t in (("exp_avg_scale", exp_avg_scale), ("exp_avg_sq_scale", exp_avg_sq_scale)):
        _check_state(op, name, t, param, torch.float32, blocks)
    return []


def _adamw_8bit(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_scale: Tensor,
    exp_avg_sq_scale: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    step: int,
) -> int:  # fmt: skip
    return _C.adamw_8bit(
        param.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(),
        exp_avg_scale.data_ptr(), exp_avg_sq_scale.data_ptr(), param.numel(), DTYPE_CODE[param.dtype],
        DTYPE_CODE[grad.dtype],
        *_numbers(lr, beta1, beta2, eps, weight_decay, step), torch.get_num_threads(), level(),
    )  # fmt: skip


@cache
def _tables(device: torch.device) -> Tensor:
    """AdamwTables on a device."""
    out = torch.empty(_C.adamw_tables_bytes, dtype=torch.uint8)
    _C.fill_adamw_tables(out.data_ptr())
    return out.to(device)


def _adamw_8bit_cuda(
    device: Device, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_scale: Tensor,
    exp_avg_sq_scale: Tensor, *numbers: float,
) -> int:  # fmt: skip
    return device.call(
        "adamw_8bit", (grad, _tables(param.device)),
        (param, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale), param.numel(),
        DTYPE_CODE[param.dtype], DTYPE_CODE[grad.dtype], *_numbers(*numbers),
    )  # fmt: skip


define(
    "adamw_8bit(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    f"Tensor(d!) exp_avg_scale, Tensor(e!) exp_avg_sq_scale, {_NUMBERS}) -> ()",
    _adamw_8bit_outputs,
    _adamw_8bit,
    _adamw_8bit_cuda,
)


def unsigned_dynamic_map() -> Tensor:
    """The 256 values of the unsigned dynamic 8-bit map that second moments index: float32, ascending."""
    out = torch.empty(256)
    _C.unsigned_dynamic_map(out.data_ptr())
    return out
