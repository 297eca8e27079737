"""Against bitsandbytes 0.50.2 on a CPU: the same codes and scales, files that both read to the same bits."""

import json
from functools import cache

import bitsandbytes as bnb
import pytest
import torch
from bits import DTYPES, assert_same_bits, hard_weight, midpoints
from bitsandbytes import functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastlora import NF4Weight, checks, quantize_nf4, reference

STATE = "weight.quant_state.bitsandbytes__nf4"


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bnb_quantize(weight, blocksize=64, nested=False, quant_type="nf4", storage=torch.uint8):
    """bitsandbytes' packed tensor, its state, and the two as the state dict of a layer."""
    packed, state = F.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    return (
        packed,
        state,
        {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()},
    )


def bnb_absmax(state):
    return F.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax


def bnb_load(tensors):
    """Our tensors as bitsandbytes loads them."""
    stats = {name.removeprefix("weight."): t for name, t in tensors.items() if name != "weight"}
    return bnb.nn.Params4bit.from_prequantized(tensors["weight"], stats, device="cpu")


def dense_by_definition(packed, absmax, blocksize, shape, dtype):
    codes = reference.nf4_unpack(packed.reshape(-1), torch.Size(shape).numel())
    return reference.nf4_dequantize(codes, absmax, blocksize, dtype).reshape(shape)


@cache
def hard_case(shape, dtype, blocksize):
    """A weight, and bitsandbytes' codes and absmax of it."""
    weight = hard_weight(shape, dtype, blocksize, seed=blocksize)
    packed, state, _ = bnb_quantize(weight, blocksize)
    absmax = state.absmax
    if weight.numel() % blocksize and absmax[-1] == 1e-38:
        # bitsandbytes stores 1e-38 for less in a last partial block; an all-zero block has absmax 0 here.
        absmax[-1] = weight.reshape(-1)[-(weight.numel() % blocksize) :].abs().max()
    return weight, packed, absmax


# --- quantising --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", checks.BLOCKSIZES)
def test_same_codes_and_absmax(format_isa, blocksize, dtype):
    for shape in ((64, 64), (5, 123), (7,), (3, 5, 7), (16, 4304), (33, 129), (1, 8193)):
        weight, packed, absmax = hard_case(shape, dtype, blocksize)
        ours = quantize_nf4(weight, blocksize=blocksize, double_quant=False).to_bitsandbytes()
        assert_same_bits(ours["weight"], packed, f"codes of {shape}")
        assert_same_bits(ours["weight.absmax"], absmax, f"absmax of {shape}")


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 80), min_size=1, max_size=3).filter(
        lambda s: torch.Size(s).numel() < 20000
    ),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from(checks.BLOCKSIZES),
    nested=st.booleans(),
    exponent=st.integers(-37, 37),
    seed=st.integers(0, 2**31),
)
@example(
    shape=[18, 25], dtype=torch.bfloat16, blocksize=32, nested=True, exponent=37, seed=0
)  # the scales' mean overflows, here and there: all is NaN
def test_any_weight_both_ways(shape, dtype, blocksize, nested, exponent, seed):
    """Theirs quantised, read by us: the dequantised bits by definition. Written back: the same file."""
    scale = 10.0 ** (exponent / 10 if dtype == torch.float16 else exponent)
    weight = (randn(*shape, seed=seed).clamp(-9, 9) * scale).to(dtype)
    packed, state, tensors = bnb_quantize(weight, blocksize, nested)
    read = NF4Weight.from_bitsandbytes(tensors)
    assert (read.shape, read.dtype, read.blocksize, read.double_quant) == (
        weight.shape,
        dtype,
        blocksize,
        nested,
    )
    absmax = bnb_absmax(state)
    assert_same_bits(read.absmax, absmax, "absmax")
    assert_same_bits(
        read.dequantize(), dense_by_definition(packed, absmax, blocksize, shape, dtype), "dequantised"
    )
    written = read.to_bitsandbytes()
    assert list(written) == list(tensors)
    for name, tensor in tensors.items():
        assert_same_bits(written[name], tensor, name)


def test_last_block_that_is_not_full_is_divided(format_isa):
    """x / absmax and x * (1 / absmax) at times round to either side of a midpoint: find where, compare."""
    found = 0
    for absmax in torch.rand(400, generator=torch.Generator().manual_seed(0)) + 0.5:
        values = midpoints() * absmax
        values = torch.cat(
            (values, values.nextafter(torch.tensor(9.0)), values.nextafter(torch.tensor(-9.0)))
        )
        multiplied = torch.bucketize(values * (1 / absmax), midpoints())
        found += int((multiplied != torch.bucketize(values / absmax, midpoints())).sum())
        for weight in (torch.cat((values, absmax[None])), torch.cat((values, absmax[None], torch.zeros(18)))):
            packed, _, _ = bnb_quantize(weight)
            ours = quantize_nf4(weight, double_quant=False)
            assert_same_bits(ours.to_bitsandbytes()["weight"], packed, f"{len(weight)} weights of {absmax}")
    assert found > 50


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_dequantises_as_bitsandbytes_does(format_isa, dtype, nested):
    packed, state, tensors = bnb_quantize(randn(96, 256, dtype=dtype), nested=nested)
    assert_same_bits(
        NF4Weight.from_bitsandbytes(tensors).dequantize(), F.dequantize_4bit(packed, state), "dense"
    )


def test_right_where_bitsandbytes_is_not():
    """Columns that blocks straddle: its AVX-512 kernel takes the wrong scales, while the codes are right."""
    weight = randn(8, 4304)
    q = quantize_nf4(weight, double_quant=False)
    assert_same_bits(q.to_bitsandbytes()["weight"], bnb_quantize(weight)[0], "codes")
    assert (q.dequantize() - weight).norm() / weight.norm() < 0.1


def test_zero_last_block_has_absmax_zero():
    q = quantize_nf4(torch.zeros(70), double_quant=False)
    assert q.absmax.tolist() == [0.0, 0.0]


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_reads_a_layer_and_bitsandbytes_reads_it_back(tmp_path, nested, storage, transposed):
    layer = bnb.nn.Linear4bit(
        128,
        96,
        quant_type="nf4",
        compress_statistics=nested,
        quant_storage=storage,
        compute_dtype=torch.bfloat16,
    )
    layer = layer.to("cpu")
    if not layer.weight.bnb_quantized:
        layer.weight._quantize("cpu")
    state = layer.state_dict()
    dense = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if transposed:
        state["weight"] = state["weight"].t()
    q = NF4Weight.from_bitsandbytes(state)
    assert q.double_quant == nested
    assert_same_bits(q.dequantize(), dense, "dense")

    path = tmp_path / "layer.safetensors"
    save_file(q.to_bitsandbytes("model.proj"), path)
    loaded = {name.removeprefix("model.proj."): t for name, t in load_file(path).items()}
    parameter = bnb_load(loaded)
    assert_same_bits(
        F.dequantize_4bit(parameter.data, parameter.quant_state), dense, "dense, by bitsandbytes"
    )
    for name, tensor in layer.state_dict().items():
        if name != "bias" and (name != "weight" or storage == torch.uint8):
            assert_same_bits(loaded[name], tensor, name)


@pytest.mark.parametrize("shape", [(64, 64), (5, 124), (5, 123), (77,), (3, 4, 10), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_reads_what_we_quantise(shape, double_quant, dtype):
    q = quantize_nf4(randn(*shape, dtype=dtype), double_quant=double_quant)
    tensors = q.to_bitsandbytes()
    parameter = bnb_load(dict(tensors))
    state = parameter.quant_state
    assert (state.shape, state.dtype, state.blocksize) == (q.shape, dtype, 64)
    assert_same_bits(bnb_absmax(state), q.absmax, "absmax")
    dense = dense_by_definition(parameter.data, q.absmax, 64, shape, dtype)
    assert_same_bits(q.dequantize(), dense, "dense")
    if shape == (64, 64):
        assert_same_bits(F.dequantize_4bit(parameter.data, state), dense, "dense, by bitsandbytes")
    assert NF4Weight.from_bitsandbytes(tensors) == q


@pytest.mark.parametrize("prefix", ["", "weight", "layer", "layer.", "layer.weight", "a.b.0", "a.weights"])
def test_prefixes(prefix):
    q = quantize_nf4(randn(4, 64))
    tensors = q.to_bitsandbytes(prefix)
    key = {"": "weight", "weight": "weight", "a.b.0": "a.b.0.weight", "a.weights": "a.weights.weight"}
    assert next(iter(tensors)) == key.get(prefix, "layer.weight")
    assert NF4Weight.from_bitsandbytes(tensors | {"other": torch.ones(1)}, prefix) == q


@pytest.mark.parametrize("change", ["map", "blocksize"])
def test_another_second_level_is_decoded_exactly(change):
    """A map or a second block size of its own cannot be kept in 8 bits: float32 absmax, the same values."""
    _, _, tensors = bnb_quantize(randn(64, 300), nested=True)
    state = json.loads(bytes(tensors[STATE].tolist()))
    state["nested_blocksize"] = 128 if change == "blocksize" else 256
    groups = -(-300 // state["nested_blocksize"])
    tensors["weight.nested_absmax"] = torch.rand(groups, generator=torch.Generator().manual_seed(1))
    if change == "map":
        tensors["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    q = NF4Weight.from_bitsandbytes(tensors)
    assert not q.double_quant
    absmax = bnb_absmax(bnb_load(dict(tensors)).quant_state)
    assert_same_bits(q.absmax, absmax, "absmax")
    assert NF4Weight.from_bitsandbytes(q.to_bitsandbytes()) == q


def test_half_precision_scales_are_widened():
    """A model cast by `.half()` takes the scales with it; bitsandbytes widens them again, and so do we."""
    _, _, tensors = bnb_quantize(randn(8, 64))
    tensors["weight.absmax"] = tensors["weight.absmax"].half()
    tensors["weight.quant_map"] = tensors["weight.quant_map"].half()
    q = NF4Weight.from_bitsandbytes(tensors)
    assert_same_bits(q.absmax, tensors["weight.absmax"].float(), "absmax")


# --- refusals ----------------------------------------------------------------------------------------------


def test_fp4_is_refused():
    _, _, tensors = bnb_quantize(randn(8, 64), quant_type="fp4")
    with pytest.raises(ValueError, match=r"expected NF4 codes, got an FP4 checkpoint at 'weight'"):
        NF4Weight.from_bitsandbytes(tensors)


def changed_state(**entries):
    def change(tensors):
        state = json.loads(bytes(tensors[STATE].tolist())) | entries
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def put(**tensors_by_name):
    def change(tensors):
        tensors.update({name.replace("__", "."): t for name, t in tensors_by_name.items()})

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t: t.clear(),
            ValueError,
            r"weight is missing; weight.absmax is missing; weight.quant_map is missing",
        ),
        (lambda t: t.pop(STATE), ValueError, r"got: weight.quant_state.bitsandbytes__nf4 is missing"),
        (
            lambda t: (t.pop("weight.nested_absmax"), t.pop("weight.nested_quant_map")),
            ValueError,
            r"weight.nested_absmax is missing; weight.nested_quant_map is missing",
        ),
        (
            put(weight=torch.zeros(255, 1, dtype=torch.uint8)),
            ValueError,
            r"weight has 255 bytes, expected 256",
        ),
        (
            put(weight__absmax=torch.zeros(3, dtype=torch.uint8)),
            ValueError,
            r"absmax has 3 elements, expected 8",
        ),
        (
            put(weight__absmax=torch.zeros(8, dtype=torch.int32)),
            ValueError,
            r"absmax is torch.int32, expected float32",
        ),
        (put(weight__nested_absmax=torch.zeros(2)), ValueError, r"nested_absmax has 2 elements, expected 1"),
        (
            put(weight__nested_quant_map=torch.zeros(16)),
            ValueError,
            r"nested_quant_map has 16 elements, expected 256",
        ),
        (
            put(weight__quant_map=torch.zeros(16)),
            ValueError,
            r"weight.quant_map holds other values than NF4's",
        ),
        (changed_state(blocksize=48), ValueError, r"blocksize is 48, expected one of \(32, "),
        (
            changed_state(blocksize=None),
            ValueError,
            r"weight.quant_state.bitsandbytes__nf4 has blocksize None",
        ),
        (changed_state(shape=None), ValueError, r"bitsandbytes__nf4 has shape None"),
        (changed_state(shape=[-8, 64]), ValueError, r"shape is \[-8, 64\], expected at least one size"),
        (changed_state(shape=[]), ValueError, r"shape is \[\], expected at least one size"),
        (changed_state(nested_offset="x"), ValueError, r"bitsandbytes__nf4 has nested_offset 'x'"),
        (changed_state(nested_blocksize=0), ValueError, r"nested_blocksize is 0, expected a positive one"),
        (changed_state(quant_type="int4"), ValueError, r"expected quant_type 'nf4' in '.*', got 'int4'"),
        (
            changed_state(dtype="float64"),
            TypeError,
            r"expected dtype float32, bfloat16, float16, got 'float64'",
        ),
        (
            lambda t: t.update({STATE: torch.tensor([7])}),
            ValueError,
            r"expected JSON in '.*', got bytes",
        ),
        (
            lambda t: t.update({STATE: torch.tensor(list(b"[1]"))}),
            ValueError,
            r"expected a JSON object in '.*', got list",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(change, error, message):
    _, _, tensors = bnb_quantize(randn(8, 64), nested=True)
    change(tensors)
    with pytest.raises(error, match=message):
        NF4Weight.from_bitsandbytes(tensors)
