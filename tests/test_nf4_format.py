"""quantize_nf4 and NF4Weight: what they hold, give back and refuse."""

import copy
import pickle

import pytest
import torch
from bits import DTYPES, assert_same_bits

import fastlora
from fastlora import NF4Weight, quantize_nf4
from fastlora import isa as levels


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "packed_shape", "blocks"),
    [
        ((8, 64), (8, 32), 8),
        ((5, 123), (5, 62), 10),
        ((7,), (4,), 1),
        ((3, 5, 9), (3, 5, 5), 3),
        ((1,), (1,), 1),
    ],
)
def test_layout(shape, packed_shape, blocks, dtype):
    weight = randn(*shape, dtype=dtype)
    plain = quantize_nf4(weight, double_quant=False)
    nested = quantize_nf4(weight)
    for q in (plain, nested):
        assert q.shape == weight.shape
        assert q.dtype == dtype
        assert q.blocksize == 64
        assert q.packed.dtype == torch.uint8
        assert q.packed.shape == packed_shape
        assert q.absmax.dtype == torch.float32
        assert q.absmax.shape == (blocks,)
        assert q.numel() == weight.numel()
        assert q.dequantize().shape == weight.shape
        assert q.dequantize().dtype == dtype
        assert q.dequantize(torch.float32).dtype == torch.float32
        assert q.bits_per_weight == 8 * q.nbytes / weight.numel()
    assert not plain.double_quant
    assert plain.nested is None
    assert plain.nbytes == plain.packed.numel() + 4 * blocks
    assert nested.double_quant
    assert nested.scales.shape == (blocks,)
    assert nested.nbytes == nested.packed.numel() + blocks + 4 * (1 + -(-blocks // 256))


def test_bits_per_weight_of_a_large_matrix():
    weight = randn(512, 512)
    assert quantize_nf4(weight, double_quant=False).bits_per_weight == 4.5
    assert quantize_nf4(weight).bits_per_weight == pytest.approx(4.127, abs=1e-3)
    assert quantize_nf4(weight, blocksize=4096, double_quant=False).bits_per_weight == pytest.approx(
        4.0078, abs=1e-4
    )


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_empty_tensors(shape, double_quant):
    q = quantize_nf4(torch.empty(shape), double_quant=double_quant)
    assert q.dequantize().shape == shape
    assert q.absmax.shape == (0,)
    assert q.bits_per_weight == 0.0
    assert NF4Weight.from_bitsandbytes(q.to_bitsandbytes()) == q


def test_quantising_again_changes_nothing():
    """Codes of dequantised weights are the same codes, for the scale is among the values."""
    q = quantize_nf4(randn(16, 200), double_quant=False)
    assert quantize_nf4(q.dequantize(), double_quant=False) == q


def test_error_is_that_of_four_bits():
    weight = randn(256, 256)
    for double_quant in (False, True):
        error = (quantize_nf4(weight, double_quant=double_quant).dequantize() - weight).norm() / weight.norm()
        assert 0.08 < error < 0.10


def test_views_and_gradients_do_not_matter():
    weight = randn(64, 96)
    want = quantize_nf4(weight.T.contiguous())
    assert quantize_nf4(weight.T) == want
    assert quantize_nf4(torch.nn.Parameter(weight).T) == want
    assert quantize_nf4(randn(64, 192)[:, ::2]) == quantize_nf4(randn(64, 192)[:, ::2].clone())
    assert not want.dequantize().requires_grad


def test_equality():
    weight = randn(6, 70)
    q = quantize_nf4(weight)
    assert q == quantize_nf4(weight)
    assert q != quantize_nf4(weight, double_quant=False)
    assert q != quantize_nf4(weight, blocksize=128)
    assert q != quantize_nf4(weight.reshape(70, 6))
    assert q != quantize_nf4(weight.half())
    assert q != quantize_nf4(-weight)
    assert q != "something else"
    with pytest.raises(TypeError, match="unhashable"):
        hash(q)


def test_copies_hold_the_same_bits():
    q = quantize_nf4(randn(6, 71))
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), q.to("cpu")):
        assert other == q
    assert copy.deepcopy(q).packed.data_ptr() != q.packed.data_ptr()


def test_repr():
    q = quantize_nf4(randn(8, 64, dtype=torch.bfloat16))
    assert repr(q) == (
        "NF4Weight(shape=(8, 64), dtype=torch.bfloat16, blocksize=64, double_quant=True, device='cpu', "
        "4.250 bits/weight, 272 bytes)"
    )


def test_meta_tensors_have_the_shapes_of_real_ones():
    """And sizes past 2^31 elements cost nothing."""
    q = quantize_nf4(torch.empty(2**16 + 1, 2**16 + 1, device="meta", dtype=torch.bfloat16))
    count = (2**16 + 1) ** 2
    blocks = -(-count // 64)
    assert q.numel() == count
    assert q.packed.shape == (2**16 + 1, 2**15 + 1)
    assert q.scales.shape == (blocks,)
    assert q.nested.shape == (4 * (1 + -(-blocks // 256)),)
    assert q.dequantize().shape == q.shape
    small = quantize_nf4(torch.zeros(5, 123))
    assert small.to("meta").packed.shape == small.packed.shape


def test_scales_may_lie_at_any_byte():
    """As slices of a flat buffer do, in a sharded model."""

    def moved(t):
        return torch.cat((t.new_zeros(1), t))[1:]

    for double_quant in (False, True):
        q = quantize_nf4(randn(5, 123), double_quant=double_quant)
        nested = moved(q.nested) if double_quant else None
        other = NF4Weight(q.packed, moved(q.scales), nested, q.shape, q.dtype)
        assert_same_bits(other.absmax, q.absmax, "absmax")
        assert_same_bits(other.dequantize(), q.dequantize(), "dequantize")
        assert NF4Weight.from_bitsandbytes(other.to_bitsandbytes()) == q


@pytest.mark.parametrize("op", ["nf4_quantize", "nf4_dequantize", "nf4_decode_absmax"])
def test_opcheck(op):
    q, plain = quantize_nf4(randn(5, 123)), quantize_nf4(randn(5, 123), double_quant=False)
    cases = {
        "nf4_quantize": [
            (randn(5, 123), 64, True, True),
            (randn(3, 4, 6, dtype=torch.bfloat16), 32, False, False),
        ],
        "nf4_dequantize": [
            (q.packed, q.scales, q.nested, 123, 64, torch.bfloat16),
            (plain.packed, plain.scales, None, 123, 64, torch.float32),
        ],
        "nf4_decode_absmax": [(q.scales, q.nested), (plain.scales, None)],
    }
    for args in cases[op]:
        torch.library.opcheck(getattr(torch.ops.fastlora, op).default, args)


def test_compiles_into_one_graph():
    q = quantize_nf4(randn(5, 123))

    def scaled(weight):
        return weight.dequantize(torch.float32) * 2, weight.absmax

    torch._dynamo.reset()
    dense, absmax = torch.compile(scaled, fullgraph=True, backend="aot_eager")(q)
    assert_same_bits(dense, q.dequantize() * 2, "dequantize")
    assert_same_bits(absmax, q.absmax, "absmax")


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, r"quantize_nf4: expected a torch.Tensor, got list"),
        (
            torch.ones(4, dtype=torch.float64),
            {},
            TypeError,
            r"expected weight in float32, .* got torch.float64",
        ),
        (torch.ones(4, dtype=torch.int8), {}, TypeError, r"expected weight in float32, .* got torch.int8"),
        (torch.tensor(1.0), {}, ValueError, r"expected a weight of at least one dimension, got a scalar"),
        (torch.ones(4), {"blocksize": 16}, ValueError, r"expected blocksize in \(32, .*, 4096\), got 16"),
        (torch.ones(4), {"blocksize": 65}, ValueError, r"expected blocksize in \(32, .*, 4096\), got 65"),
        (torch.ones(4), {"blocksize": 8192}, ValueError, r"expected blocksize in \(32, .*, 4096\), got 8192"),
        (
            torch.tensor([[1.0, 2.0], [3.0, float("nan")]]),
            {},
            ValueError,
            r"expected finite weights, got 1 NaN or Inf of 4, the first at index \(1, 1\)",
        ),
    ],
)
def test_quantising_refuses(weight, options, error, message):
    with pytest.raises(error, match=message):
        quantize_nf4(weight, **options)


def parts(**changed):
    q = quantize_nf4(randn(4, 64))
    fields = {
        name: getattr(q, name) for name in ("packed", "scales", "nested", "shape", "dtype", "blocksize")
    }
    return fields | changed


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"shape": (4, 66)}, ValueError, r"expected packed of shape \(4, 33\) .* \(4, 66\), got \(4, 32\)"),
        ({"shape": ()}, ValueError, r"expected a shape of at least one dimension, got \(\)"),
        ({"dtype": torch.int8}, TypeError, r"expected dtype float32, bfloat16 or float16, got torch.int8"),
        ({"blocksize": 100}, ValueError, r"expected blocksize in \(32, .*, 4096\), got 100"),
        ({"blocksize": 32}, ValueError, r"expected scales of shape \(8,\) .*, got \(4,\)"),
        (
            {"nested": None},
            ValueError,
            r"expected scales of shape \(16,\) \(4 blocks, 4 bytes each\), got \(4,\)",
        ),
        (
            {"nested": torch.zeros(9, dtype=torch.uint8)},
            ValueError,
            r"expected nested of shape \(8,\) .*, got \(9,\)",
        ),
        ({"packed": torch.zeros(4, 32)}, TypeError, r"expected packed in uint8, got torch.float32"),
        ({"scales": torch.zeros(4)}, TypeError, r"expected scales in uint8, got torch.float32"),
        (
            {"scales": torch.zeros(4, dtype=torch.uint8, device="meta")},
            RuntimeError,
            r"expected scales on cpu, got meta",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changed, error, message):
    with pytest.raises(error, match=r"NF4Weight: " + message):
        NF4Weight(**parts(**changed))


def test_dequantising_refuses():
    q = quantize_nf4(randn(4, 64))
    with pytest.raises(
        TypeError, match=r"nf4_dequantize: expected dtype float32, bfloat16 or float16, got torch.int32"
    ):
        q.dequantize(torch.int32)
    with pytest.raises(
        ValueError, match=r"expected packed of shape \(4, 33\) \(a weight of 4 x 65\), got \(4, 32\)"
    ):
        torch.ops.fastlora.nf4_dequantize(q.packed, q.scales, q.nested, 65, 64, torch.float32)
    with pytest.raises(ValueError, match=r"expected packed of shape \(n, ceil\(k / 2\)\), got \(128,\)"):
        torch.ops.fastlora.nf4_dequantize(q.packed.reshape(-1), q.scales, q.nested, 64, 64, torch.float32)


@pytest.mark.parametrize(
    ("scales", "nested", "error", "message"),
    [
        (torch.zeros(3), None, TypeError, r"expected scales in uint8, got torch.float32"),
        (
            torch.zeros(2, 4, dtype=torch.uint8),
            None,
            ValueError,
            r"expected scales of one dimension, got .*\(2, 4\)",
        ),
        (
            torch.zeros(7, dtype=torch.uint8),
            None,
            ValueError,
            r"expected scales of 4 bytes a block, got 7 bytes",
        ),
        (
            torch.zeros(7, dtype=torch.uint8),
            torch.zeros(4, dtype=torch.uint8),
            ValueError,
            r"nested of shape \(8,\)",
        ),
        (
            torch.zeros(7, dtype=torch.uint8),
            torch.zeros(8, dtype=torch.uint8, device="meta"),
            RuntimeError,
            r"expected nested on cpu, got meta",
        ),
    ],
)
def test_decoding_scales_refuses(scales, nested, error, message):
    with pytest.raises(error, match=r"nf4_decode_absmax: .*" + message):
        torch.ops.fastlora.nf4_decode_absmax(scales, nested)


def test_moving_to_a_dtype_is_refused():
    """`.to` takes devices: casting codes would destroy them."""
    with pytest.raises((TypeError, RuntimeError)):
        quantize_nf4(randn(4, 64)).to(torch.float16)


def test_levels_are_named_and_checked():
    assert fastlora.current_isa() in fastlora.available_isas()
    with (
        pytest.raises(ValueError, match=r"isa: expected one of scalar, .*, got 'sse9'"),
        levels.use_isa("sse9"),
    ):
        pass
    missing = [name for name in levels.LEVELS if name not in levels.available_isas()]
    for name in missing:
        with (
            pytest.raises(RuntimeError, match=rf"isa: level '{name}' is not available"),
            levels.use_isa(name),
        ):
            pass
