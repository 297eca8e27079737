"""lora_dropout: the mask is the reference's, bit for bit, whatever the device, the dtype, the strides and the
threads."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_cases import FLOATS

from fastlora import reference

op = torch.ops.fastlora
on_cpu = op.lora_dropout  # before a fixture puts another device in its place
SEEDS = (0, 1, 0x7FFFFFFFFFFFFFFF, -1, -(2**63), 1234567890123456789)


def check(x: torch.Tensor, seed: int, p: float) -> None:
    """Equal to float32's x * (1 / (1 - p)), rounded once to the dtype."""
    got = op.lora_dropout(x, torch.tensor(seed), p)
    keep = reference.lora_dropout_mask(tuple(x.shape), seed, p)
    scaled = (x.float() * torch.tensor(1 / (1 - p), dtype=torch.float32)).to(x.dtype)
    assert got.shape == x.shape
    assert got.dtype == x.dtype
    assert torch.equal(got, torch.where(keep, scaled, torch.zeros_like(x)))
    assert_same_bits(got, on_cpu(x, torch.tensor(seed), p), "the CPU's and the device's")
    torch.testing.assert_close(got.double(), reference.lora_dropout(x, seed, p), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0, 5), (7, 33), (2, 3, 4, 5), (20001,)], ids=str)
def test_matches_reference(op_device: str, dtype: torch.dtype, p: float, shape: tuple[int, ...]) -> None:
    check(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype), 42, p)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(0, 600),
    seed=st.integers(-(2**63), 2**63 - 1) | st.sampled_from(SEEDS),
    p=st.floats(0.0, 0.9999),
    dtype=st.sampled_from(FLOATS),
)
def test_matches_reference_for_any_seed(
    op_device: str, count: int, seed: int, p: float, dtype: torch.dtype
) -> None:
    check(torch.linspace(-2, 2, count).to(dtype), seed, p)


def test_nothing_is_dropped_at_zero(op_device: str) -> None:
    x = torch.randn(40, 50)
    assert torch.equal(op.lora_dropout(x, torch.tensor(5), 0.0), x)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_independence(p: float) -> None:
    """The share kept, and kept by two seeds or neighbours alike, within five standard deviations."""
    count = 200_000
    ones = torch.ones(count)
    first, second = (op.lora_dropout(ones, torch.tensor(seed), p) > 0 for seed in (1, 2))
    for share, want in (
        (first.float().mean(), 1 - p),
        ((first & second).float().mean(), (1 - p) ** 2),
        ((first[1:] & first[:-1]).float().mean(), (1 - p) ** 2),
    ):
        assert abs(share.item() - want) < 5 * (want * (1 - want) / count) ** 0.5


def test_same_bits_for_any_thread_count(keep_threads: None) -> None:
    x, seed = torch.randn(100_003), torch.tensor(9)
    torch.set_num_threads(1)
    want = op.lora_dropout(x, seed, 0.3)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(op.lora_dropout(x, seed, 0.3), want)


def test_strides_do_not_matter(op_device: str) -> None:
    """The mask goes by the logical index, not by where an element lies in memory."""
    x = torch.randn(6, 10)
    want = op.lora_dropout(x, torch.tensor(3), 0.5)
    for same in (x.T.contiguous().T, torch.cat((x, x), 1)[:, :10]):
        assert torch.equal(op.lora_dropout(same, torch.tensor(3), 0.5), want)


def test_nan_is_dropped_too(op_device: str) -> None:
    x = torch.full((1000,), torch.nan)
    got = op.lora_dropout(x, torch.tensor(3), 0.5)
    assert torch.equal(got.isnan(), reference.lora_dropout_mask((1000,), 3, 0.5))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_address(op_device: str, dtype: torch.dtype) -> None:
    """A view that begins off a vector, and one that ends off one."""
    x = torch.randn(65, generator=torch.Generator().manual_seed(2)).to(dtype)
    check(x[1:], 7, 0.4)
    check(x[:63], 7, 0.4)


def test_a_scalar(op_device: str) -> None:
    x = torch.tensor(2.0)
    assert torch.equal(op.lora_dropout(x, torch.tensor(3), 0.0), x)
