"""fastlora.QLinear as a module: what it computes, keeps, saves and refuses."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastlora
from fastlora import QLinear

K, N = 72, 40
BASE = ("weight", "weight_scales", "weight_nested")
CLOSE = {torch.float32: {}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}}


def trained(rank=4, **kwargs):
    """A layer whose adapter does something."""
    torch.manual_seed(0)
    layer = QLinear(K, N, rank=rank, **kwargs)
    if rank:
        nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def base_bits(layer):
    return [None if getattr(layer, n) is None else getattr(layer, n).detach().clone() for n in BASE]


def same_bits(first, second):
    return all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(first, second, strict=True)
    )


# --- construction -----------------------------------------------------------------------------------------


def test_from_linear_is_the_quantised_layer_plus_bias():
    linear = nn.Linear(K, N)
    layer = QLinear.from_linear(linear, rank=4)
    weight = fastlora.quantize_nf4(linear.weight.detach())
    assert layer.quantized_weight == weight
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), F.linear(x, weight.dequantize(), linear.bias))
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    assert isinstance(layer, nn.Linear)


def test_a_direct_layer_draws_what_a_dense_one_would():
    torch.manual_seed(7)
    dense = nn.Linear(K, N)
    torch.manual_seed(7)
    layer = QLinear(K, N)
    assert layer.quantized_weight == fastlora.quantize_nf4(dense.weight.detach())
    assert torch.equal(layer.bias, dense.bias)


def test_the_adapter_starts_as_kaiming_and_zero():
    layer = QLinear(4096, 8, rank=64)
    assert not layer.lora_B.any()
    bound = 1 / math.sqrt(4096)  # kaiming_uniform with a = sqrt(5) over fan-in k
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.abs().max() > 0.99 * bound
    x = torch.randn(2, 4096)
    plain = copy.deepcopy(layer)
    plain.lora_A = plain.lora_B = None
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize(
    ("kwargs", "scaling"),
    [
        ({"rank": 8, "alpha": 16}, 2.0),
        ({"rank": 16, "alpha": 8, "use_rslora": True}, 2.0),
        ({"rank": 4, "alpha": 1}, 0.25),
    ],
    ids=str,
)
def test_scaling(kwargs, scaling):
    layer = trained(**kwargs)
    assert layer.scaling == scaling
    x = torch.randn(3, K)
    want = F.linear(x, layer.dequantize(), layer.bias) + scaling * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), want)


def test_the_parameters_and_their_kinds():
    layer = QLinear(71, 5, rank=2, dtype=torch.bfloat16)
    kinds = {
        name: (tuple(p.shape), p.dtype, p.requires_grad, type(p) is nn.Parameter)
        for name, p in layer.named_parameters()
    }
    assert kinds == {
        "weight": ((5, 36), torch.uint8, False, True),
        "weight_scales": ((6,), torch.uint8, False, True),
        "weight_nested": ((8,), torch.uint8, False, True),
        "bias": ((5,), torch.bfloat16, True, True),
        "lora_A": ((2, 71), torch.float32, True, True),
        "lora_B": ((5, 2), torch.float32, True, True),
    }
    assert not list(layer.buffers())


def test_without_double_quantisation_or_bias():
    layer = QLinear(K, N, False, double_quant=False, blocksize=128)
    assert layer.weight_nested is None
    assert layer.bias is None
    assert set(layer.state_dict()) == {"weight", "weight_scales", "lora_A", "lora_B"}
    x = torch.randn(2, K)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rank_zero_is_a_plain_quantised_layer(layer_device, dtype):
    layer = trained(rank=0, dtype=dtype)
    assert set(layer.state_dict()) == {*BASE, "bias"}
    x = torch.randn(2, K, dtype=dtype, requires_grad=True)
    y = layer.train()(x)
    dense, close = layer.dequantize(torch.float32), CLOSE[dtype]
    torch.testing.assert_close(y.float(), F.linear(x.float(), dense, layer.bias.float()), **close)
    y.sum().backward()
    torch.testing.assert_close(x.grad.float(), dense.sum(0).expand_as(x), **close)
    layer.merge()
    assert not layer.merged


def test_from_linear_follows_the_dense_layer():
    linear = nn.Linear(K, N, bias=False, dtype=torch.bfloat16).eval()
    layer = QLinear.from_linear(linear)
    assert (layer.bias, layer.weight_dtype, layer.training) == (None, torch.bfloat16, False)
    assert layer.dequantize().dtype == torch.bfloat16
    assert layer.lora_A.dtype == torch.float32
    frozen = nn.Linear(K, N).requires_grad_(False)
    assert not QLinear.from_linear(frozen).bias.requires_grad
    assert QLinear.from_linear(frozen, adapter_dtype=torch.bfloat16).lora_A.dtype == torch.bfloat16


def test_meta_construction_then_loading():
    layer = trained()
    with torch.device("meta"):
        empty = QLinear(K, N, rank=4)
    assert all(p.is_meta for p in empty.parameters())
    assert empty(torch.empty(2, K, device="meta")).shape == (2, N)
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, K)
    assert torch.equal(empty(x), layer(x))
    assert not empty.weight.requires_grad

    drawn = QLinear(K, N, device="meta").to_empty(device="cpu")
    drawn.reset_parameters()
    assert torch.isfinite(drawn(x)).all()
    assert QLinear.from_linear(nn.Linear(K, N, device="meta")).weight.is_meta


# --- computing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_layer_computes_in_the_dtype_of_x(layer_device, dtype, x_dtype):
    layer = trained(dtype=dtype)
    x = torch.randn(3, K)
    y = layer(x.to(x_dtype))
    assert y.dtype == x_dtype
    want = F.linear(x, layer.dequantize(torch.float32), layer.bias.float())
    want = want + layer.scaling * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_in_training_only(layer_device, dtype):
    layer = trained(dropout=0.5)
    x = torch.randn(64, K, dtype=dtype)
    assert not torch.equal(layer.train()(x), layer(x))
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(layer(x), trained(dropout=0.0)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_training_step_lowers_the_loss_and_moves_the_adapter_alone(layer_device, dtype, dropout):
    layer = trained(dropout=dropout)
    before = base_bits(layer)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=2e-2)
    x, target = torch.randn(64, K, dtype=dtype), torch.randn(64, N)
    losses = []
    for _ in range(15):
        value = F.mse_loss(layer(x).float(), target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]
    assert same_bits(base_bits(layer), before)
    assert layer.weight.grad is None


# --- merging ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
def test_merge_requantises_and_unmerge_gives_the_bits_back(op_device, double_quant):
    layer = trained(double_quant=double_quant).eval()
    x = torch.randn(5, K)
    y, bits, parameter = layer(x), base_bits(layer), layer.weight
    summed = layer.dequantize() + layer.scaling * (layer.lora_B @ layer.lora_A).detach()
    layer.merge()
    assert layer.merged
    assert layer.quantized_weight == fastlora.quantize_nf4(summed, double_quant=double_quant)
    torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize(), layer.bias))
    assert 0 < ((layer(x) - y).norm() / y.norm()) < 0.2  # lossy, and not wrong
    merged = base_bits(layer)
    layer.merge()  # twice is once
    assert same_bits(base_bits(layer), merged)
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    assert same_bits(base_bits(layer), bits)
    assert layer.weight is parameter
    assert torch.equal(layer(x), y)


def test_while_merged_the_state_dict_is_that_of_the_unmerged_layer():
    layer = trained().eval()
    want = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.merge()
    got = layer.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[k], want[k]) for k in want)
    fresh = QLinear(K, N, rank=4)
    fresh.load_state_dict(got)
    x = torch.randn(2, K)
    layer.unmerge()
    assert torch.equal(fresh(x), layer(x))


def test_loading_or_training_unmerges():
    layer, other = trained().eval(), QLinear(K, N, rank=4)
    layer.merge()
    layer.load_state_dict(other.state_dict())
    assert not layer.merged
    assert same_bits(base_bits(layer), base_bits(other))
    layer.merge()
    nn.Sequential(layer).train()
    assert not layer.merged


def test_a_training_forward_while_merged_is_refused():
    layer = trained()
    layer.merge()
    x = torch.randn(2, K)
    with pytest.raises(RuntimeError, match="expected an unmerged layer in training"):
        layer(x)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)


def test_a_merge_that_fails_changes_nothing():
    layer = trained()
    with torch.no_grad():
        layer.lora_B[3, 0] = math.inf
    before = base_bits(layer)
    with pytest.raises(ValueError, match="NaN or Inf"):
        layer.merge()
    assert not layer.merged
    assert same_bits(base_bits(layer), before)


def test_a_merged_layer_can_be_copied_pickled_and_moved():
    layer = trained().eval()
    bits = base_bits(layer)
    layer.merge()
    x = torch.randn(2, K)
    for clone in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer).to("cpu").half(),
    ):
        assert clone.merged
        torch.testing.assert_close(clone(x), layer(x), rtol=1e-2, atol=1e-3)
        clone.unmerge()
        assert same_bits(base_bits(clone), bits)
    assert layer.merged
    moved = copy.deepcopy(layer).to("meta")
    moved.unmerge()
    assert moved.weight.is_meta


# --- keeping ----------------------------------------------------------------------------------------------


def test_state_dict_round_trip_is_bit_exact(tmp_path):
    layer = trained(dtype=torch.bfloat16)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    fresh = QLinear(K, N, rank=4, dtype=torch.bfloat16)
    assert not fresh.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True)).missing_keys
    for (name, a), (_, b) in zip(layer.state_dict().items(), fresh.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    x = torch.randn(2, K, dtype=torch.bfloat16)
    assert torch.equal(layer(x), fresh(x))


def test_deepcopy_and_pickle():
    layer = trained(dropout=0.1, use_rslora=True)
    x = torch.randn(2, K)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(clone.eval()(x), layer.eval()(x))
        assert clone.weight.data_ptr() != layer.weight.data_ptr()
        assert repr(clone) == repr(layer)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.double().float(),
    ],
)
def test_casts_leave_the_codes_alone(cast):
    layer = trained()
    before = base_bits(layer)
    cast(layer)
    assert same_bits(base_bits(layer), before)
    assert layer.weight.dtype == torch.uint8
    assert layer.bias.dtype == layer.lora_A.dtype


def test_repr_says_what_it_stores():
    text = repr(QLinear(4096, 1024, rank=8, use_rslora=True))
    assert text.startswith("QLinear(in_features=4096, out_features=1024, bias=True, rank=8, alpha=32")
    assert "4.127 bits/weight" in text
    assert "use_rslora=True" in text
    assert "4.500 bits/weight" in repr(QLinear(4096, 64, rank=0, double_quant=False))
    merged = trained()
    merged.merge()
    assert repr(merged).endswith("merged)")


# --- refusing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((0, 4), {}, ValueError, "expected in_features >= 1, got 0"),
        ((4, -1), {}, ValueError, "expected out_features >= 1, got -1"),
        ((4.0, 4), {}, TypeError, "expected in_features as an int, got 4.0"),
        ((4, 4), {"rank": -1}, ValueError, "expected rank >= 0, got -1"),
        ((4, 4), {"rank": True}, TypeError, "expected rank as an int, got True"),
        ((4, 4), {"alpha": math.nan}, ValueError, "expected a finite alpha, got nan"),
        ((4, 4), {"dropout": 1.0}, ValueError, r"expected dropout in \[0, 1\), got 1.0"),
        ((4, 4), {"blocksize": 48}, ValueError, r"expected blocksize in \(32, .*got 48"),
        ((4, 4), {"dtype": torch.float64}, TypeError, "expected dtype float32, bfloat16 or float16"),
        (
            (4, 4),
            {"adapter_dtype": torch.int8},
            TypeError,
            "expected adapter_dtype float32, .* got torch.int8",
        ),
    ],
    ids=str,
)
def test_bad_arguments(args, kwargs, error, message):
    with pytest.raises(error, match="QLinear: " + message):
        QLinear(*args, **kwargs)


def test_bad_inputs_to_from_linear():
    for bad in (nn.Conv1d(2, 2, 1), QLinear(K, N)):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Linear, got"):
            QLinear.from_linear(bad)
    with pytest.raises(TypeError, match=r"expected a matrix of float32, .* got \(40, 72\) of torch\.float64"):
        QLinear.from_linear(nn.Linear(K, N, dtype=torch.float64))
    linear = nn.Linear(K, N)
    with torch.no_grad():
        linear.weight[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"1 NaN or Inf .*first at index \(1, 2\)"):
        QLinear.from_linear(linear)
    with pytest.raises(RuntimeError, match="expected a weight with data, got a meta one"):
        QLinear.from_linear(nn.Linear(K, N, device="meta"), device="cpu")


def test_a_wrong_width_of_x():
    layer = QLinear(K, N)
    for x in (torch.randn(2, K - 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"QLinear: expected x of shape \(\.\.\., 72\), got"):
            layer(x)


def test_a_dense_weight_is_not_loaded_as_codes():
    layer = QLinear(1, 4, rank=0)  # one column: dense and packed have the same shape
    before = base_bits(layer)
    state = {**layer.state_dict(), "weight": torch.randn(4, 1)}
    with pytest.raises(RuntimeError, match=r"expected weight in uint8 \(packed NF4\), got torch\.float32"):
        layer.load_state_dict(state)
    assert same_bits(base_bits(layer), before)
