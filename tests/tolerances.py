"""What rounding may cost: the one table that every comparison with the float64 reference uses.

Two bounds hold at once. `frobenius` bounds ‖got - want‖ / ‖want‖ over a whole result: twice what is typical,
because at rank 1 the rounding of s·B may be one and the same for all elements. Elementwise it is

    products·Σ|x||w| + peak·max|x|·Σ|w| + low_rank·|s|·Σ|u||b| + output·|y| + smallest

where Σ|u| itself is taken with magnitudes: products for the rounding of W and for the accumulation, peak for
routes that turn a row of x into integers of one scale, low_rank for the rounding of u (or v) and of the
adapters to x's dtype (three roundings: s·B, u or v, A), output for the last rounding. A rounding is at most
2^-8 of the value in bfloat16, 2^-11 in float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    frobenius: float
    products: float
    peak: float
    low_rank: float
    output: float
    smallest: float  # added to every bound: the spacing of the dtype's subnormals


TOLERANCES = {
    torch.float32: Tolerance(3e-6, 4e-6, 0.0, 8e-6, 1e-6, 1e-36),
    torch.bfloat16: Tolerance(5e-3, 2**-8, 2**-15, 3.1 * 2**-8, 2**-8, 1e-36),
    torch.float16: Tolerance(1e-3, 2**-8, 2**-15, 2**-9, 2**-11, 2**-24),
}

# How much worse than dequantise-to-x's-dtype and a dense product with float32 accumulation.
DENSE_FACTOR = 1.1


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖, Frobenius, in float64."""
    want = want.double()
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-300)).item()


def _name_the_worst(name: str, got: Tensor, want: Tensor, bound: Tensor) -> str:
    excess = (got.double() - want).abs() / bound
    where = tuple(int(i) for i in torch.unravel_index(excess.nan_to_num(torch.inf).argmax(), got.shape))
    return (
        f"{name}{list(where)} is {got[where].item():.9g}, expected {want[where].item():.9g} "
        f"within {bound[where].item():.3g} ({int((~(excess <= 1)).sum())} of {got.numel()} are outside)"
    )


def assert_within(name: str, got: Tensor, want: Tensor, bound: Tensor, frobenius: float) -> None:
    """`got` (any dtype) is elementwise within `bound` of `want` (float64), and within `frobenius` of it as a
    whole wherever there are enough elements for that to mean something."""
    assert got.shape == want.shape, f"{name}: expected shape {tuple(want.shape)}, got {tuple(got.shape)}"
    if got.numel() == 0:
        return
    bound = bound + TOLERANCES[got.dtype].smallest
    close = (got.double() - want).abs() <= bound
    assert bool(close.all()), _name_the_worst(name, got, want, bound)
    # With few rows or columns a handful of roundings is shared by all elements, and theirs is no average.
    if min(got.shape[-1], got.numel() // got.shape[-1]) >= 16:
        error = relative_error(got, want)
        assert error <= frobenius, (
            f"{name}: relative Frobenius error {error:.3g}, at most {frobenius:.3g} allowed"
        )


def linear_bound(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    y: Tensor,
    dtype: torch.dtype,
    gain: Tensor | None = None,
) -> Tensor:
    """The elementwise bound of y = gain·(x·Wᵀ + s·(x·Aᵀ)·Bᵀ) + bias, given the float64 result `y`."""
    t = TOLERANCES[dtype]
    x, weight = x.double().abs(), weight.double().abs()
    peak = x.amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(())
    bound = t.products * (x @ weight.T) + t.peak * peak * weight.sum(1)
    if lora_a is not None and lora_b is not None:
        u = x @ lora_a.double().abs().T
        bound = bound + t.low_rank * abs(scaling) * (u @ lora_b.double().abs().T)
    if gain is not None:
        bound = bound * gain.double().abs()
    return bound + t.output * y.abs()
