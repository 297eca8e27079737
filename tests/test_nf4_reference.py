"""The specification itself: against exhaustive search, published values and autograd."""

import pytest
import torch
from bits import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora import ops, reference


def test_the_kernels_hold_the_same_two_maps():
    assert_same_bits(ops.nf4_codes(), reference.CODES, "the 16 codes")
    assert_same_bits(ops.nf4_dynamic_map(), reference.dynamic_map(), "the dynamic map")


def test_dynamic_map_is_what_its_definition_says():
    entries = reference.dynamic_map().double()
    assert entries.shape == (256,)
    assert (entries[1:] > entries[:-1]).all()
    assert entries[127] == 0
    assert entries[255] == 1
    assert (entries[:127] == -entries[128:255].flip(0)).all()
    exact = [10.0 ** (d - 6) * (0.1 + 0.9 * (i + 0.5) / 2**d) for d in range(7) for i in range(2**d)]
    assert torch.allclose(entries[128:255], torch.tensor(exact, dtype=torch.float64), rtol=3e-7, atol=0)


def test_codes_are_the_nearest_by_search():
    weight = torch.randn(64, 65)
    codes, absmax = reference.nf4_quantize(weight, 64)
    scaled = weight.reshape(65, 64).double() / absmax[:, None].double()
    distance = (scaled[..., None] - reference.CODES.double()).abs()
    best = distance.amin(-1)
    got = distance.gather(-1, codes.reshape(65, 64).long()[..., None])[..., 0]
    assert (got <= best + 1e-6).all()


@settings(max_examples=30, deadline=None)
@given(blocks=st.integers(0, 700), power=st.integers(0, 6), seed=st.integers(0, 2**31))
def test_second_level_codes_are_the_nearest_by_search(blocks, power, seed):
    absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(seed)) ** (power + 1)
    codes, nested = reference.nf4_double_quantize(absmax)
    assert nested.shape == (1 + -(-blocks // 256),)
    scale = nested[1:].repeat_interleave(256)[:blocks]
    residual = absmax - nested[0]
    scaled = torch.where(scale > 0, residual / scale, 0.0).double()
    distance = (scaled[:, None] - reference.dynamic_map().double()).abs()
    assert (distance.gather(1, codes.long()[:, None])[:, 0] == distance.amin(1)).all()
    assert blocks == 0 or abs(nested[0].item() - absmax.double().mean().item()) <= 1e-7 * nested[0].item()


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-39, 1e38])
def test_second_level_of_extreme_scales_agrees_with_the_kernel(scale):
    absmax = torch.rand(300, generator=torch.Generator().manual_seed(0)) * scale
    codes, nested = reference.nf4_double_quantize(absmax)
    decoded = torch.ops.fastlora.nf4_decode_absmax(codes, nested.view(torch.uint8))
    assert_same_bits(decoded, reference.nf4_decode_absmax(codes, nested), "decoded")
    assert ((decoded - absmax).abs() <= 0.02 * absmax.max()).all()


@settings(deadline=None)
@given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_packing_is_undone_by_unpacking(shape, seed):
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = reference.nf4_pack(codes)
    assert packed.shape == (*shape[:-1], (shape[-1] + 1) // 2)
    assert torch.equal(reference.nf4_unpack(packed, shape[-1]), codes)
    if shape[-1] % 2 and codes.numel():
        assert (packed[..., -1] & 15 == 7).all()


def test_even_columns_are_the_high_nibble():
    assert reference.nf4_pack(torch.tensor([[1, 2, 15]], dtype=torch.uint8)).tolist() == [[0x12, 0xF7]]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_gradients_are_those_of_the_forward(lead, rank):
    n, k, scaling = 5, 7, 0.75
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    x, bias, a, b = leaf(*lead, k), leaf(n), leaf(rank, k), leaf(n, rank)
    weight, dy = leaf(n, k).detach(), leaf(*lead, n).detach()
    y, u = reference.nf4_linear(x, weight, bias, a, b, scaling)
    assert torch.allclose(u, x @ a.T)
    dx, dbias, da, db = torch.autograd.grad(y, (x, bias, a, b), dy)
    got_dx, v = reference.nf4_linear_grad_input(dy, weight, a, b, scaling)
    assert torch.allclose(got_dx, dx)
    assert torch.allclose(reference.lora_grad_a(v, x), da)
    assert torch.allclose(reference.lora_grad_b(dy, u, scaling), db)
    assert torch.allclose(reference.grad_bias(dy), dbias)


def test_forward_passes_gradcheck():
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    weight = leaf(4, 6).detach()
    inputs = (leaf(3, 6), leaf(4), leaf(2, 6), leaf(4, 2))
    assert torch.autograd.gradcheck(
        lambda x, bias, a, b: reference.nf4_linear(x, weight, bias, a, b, 1.5)[0], inputs
    )


def test_without_adapters():
    x, weight = torch.randn(3, 6), torch.randn(4, 6)
    y, u = reference.nf4_linear(x, weight)
    assert torch.allclose(y, x.double() @ weight.double().T)
    assert u.shape == (3, 0)
    dx, v = reference.nf4_linear_grad_input(y, weight)
    assert torch.allclose(dx, y @ weight.double())
    assert v.shape == (3, 0)


def test_dropout_mask_is_splitmix64():
    """Its published outputs for the state 1234567: element i is output i - 1."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    for i, output in enumerate(outputs, start=1):
        top = output >> 32
        at, past = top / 2**32, (top + 1) / 2**32
        assert reference.lora_dropout_mask((5,), 1234567, at)[i]
        assert not reference.lora_dropout_mask((5,), 1234567, past)[i]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_equals_the_kernel(seed, p):
    x = torch.randn(37, 53, generator=torch.Generator().manual_seed(1))
    got = torch.ops.fastlora.lora_dropout(x, torch.tensor([seed]), p)
    assert torch.equal(got != 0, reference.lora_dropout_mask((37, 53), seed, p))
    assert torch.allclose(got.double(), reference.lora_dropout(x, seed, p), rtol=1e-6)
