"""LoftQ, PiSSA and the other ways an adapter may start."""

import inspect
import math

import pytest
import torch
from tolerances import TOLERANCES, relative_error
from torch import nn

import fastlora
from fastlora import QLinear, quantize_nf4
from fastlora.methods.loftq import loftq
from fastlora.methods.low_rank import truncated_svd
from fastlora.methods.pissa import pissa

K, N, R = 72, 40, 6


def matrix(n=N, k=K, dtype=torch.float32):
    """With a few large directions, as trained weights have."""
    torch.manual_seed(0)
    return (torch.randn(n, 4) @ torch.randn(4, k) + 0.3 * torch.randn(n, k)).to(dtype)


def linear(dtype=torch.float32):
    layer = nn.Linear(K, N, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(matrix(dtype=dtype))
    return layer


def effective(layer):
    """The float64 matrix that a layer multiplies by."""
    return layer.dequantize(torch.float32).double() + layer.scaling * (
        layer.lora_B.double() @ layer.lora_A.double()
    )


def distance(layer, weight):
    return (effective(layer) - weight.double()).norm().item()


# --- the decomposition ------------------------------------------------------------------------------------


def test_truncated_svd():
    m = matrix()
    u, s, vh = torch.linalg.svd(m.double())
    want = (u[:, :R] * s[:R]) @ vh[:R]
    for niter in (None, 8):
        a, b, c = truncated_svd(m, R, niter)
        assert (a.shape, b.shape, c.shape) == ((N, R), (R,), (R, K))
        error = ((a * b) @ c - want).norm() / want.norm()
        assert error < (1e-5 if niter is None else 0.1)


# --- PEFT's own numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 4])
def test_loftq_is_pefts(iterations):
    utils = pytest.importorskip("peft.utils.loftq_utils", reason="PEFT is not installed")
    pytest.importorskip("bitsandbytes", reason="PEFT's LoftQ quantises with bitsandbytes")
    source = inspect.getsource(utils.loftq_init).replace('else "cuda"', 'else "cpu"')
    names = dict(vars(utils))
    exec(source, names)  # PEFT's function, which knows no device but CUDA's and XPU's, on the CPU
    weight = matrix(64, 128)
    want, want_a, want_b = names["loftq_init"](weight, num_bits=4, reduced_rank=R, num_iter=iterations)
    base, a, b = loftq(weight, R, iterations=iterations, double_quant=False)
    torch.testing.assert_close(base.dequantize(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(b @ a, want_b @ want_a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.abs(), want_b.abs(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a.abs(), want_a.abs(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("alpha", [R, 32])
def test_pissa_is_pefts(alpha):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    dense = nn.Sequential(linear())
    config = peft.LoraConfig(r=R, lora_alpha=alpha, target_modules=["0"], init_lora_weights="pissa")
    ours = QLinear.from_linear(dense[0], rank=R, alpha=alpha, init="pissa")
    theirs = peft.get_peft_model(dense, config).base_model.model[0]
    torch.testing.assert_close(ours.lora_A, theirs.lora_A["default"].weight)
    torch.testing.assert_close(ours.lora_B, theirs.lora_B["default"].weight)
    rest, _, _ = pissa(matrix(), R, scaling=alpha / R)
    torch.testing.assert_close(rest, theirs.base_layer.weight.detach(), rtol=1e-5, atol=1e-5)
    assert ours.quantized_weight == quantize_nf4(rest)


# --- what they are for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_layers_start_closer_to_the_dense_weight(dtype, use_rslora):
    dense = linear(dtype)
    kwargs = {"rank": R, "alpha": 16, "use_rslora": use_rslora}
    plain = QLinear.from_linear(dense, **kwargs)
    once = QLinear.from_linear(dense, **kwargs, init="loftq")
    more = QLinear.from_linear(dense, **kwargs, init="loftq_niter_5")
    principal = QLinear.from_linear(dense, **kwargs, init="pissa")
    assert once.quantized_weight == plain.quantized_weight != more.quantized_weight
    d = [distance(layer, dense.weight.detach()) for layer in (plain, once, more, principal)]
    assert d[1] < 0.8 * d[0]
    assert d[2] < d[1]
    assert d[3] < 0.5 * d[0]
    assert once.lora_A.dtype == torch.float32
    x = torch.randn(3, K, dtype=dtype)
    want = x.double() @ effective(principal).T + dense.bias.double()
    assert relative_error(principal(x), want) < 2 * TOLERANCES[dtype].frobenius


def test_the_best_low_rank_part_of_what_was_lost():
    dense = linear()
    layer = QLinear.from_linear(dense, rank=R, alpha=2, init="loftq")
    lost = dense.weight.detach().double() - layer.dequantize(torch.float32).double()
    u, s, vh = torch.linalg.svd(lost)
    want = (u[:, :R] * s[:R]) @ vh[:R]
    got = layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
    assert ((got - want).norm() / want.norm()).item() < 1e-4


def test_gaussian():
    torch.manual_seed(0)
    layer = QLinear.from_linear(nn.Linear(500, 30), rank=16, init="gaussian")
    assert layer.lora_A.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert layer.lora_A.abs().max() > 3 / 16  # a uniform one of this deviation would end at sqrt(3) of it
    assert not layer.lora_B.any()


def test_a_rank_beyond_the_matrix():
    for init in ("loftq", "pissa", "pissa_niter_2"):
        layer = QLinear.from_linear(nn.Linear(5, 3), rank=8, init=init)
        assert layer.lora_A.shape == (8, 5)
        assert not layer.lora_A[3:].any()
        assert not layer.lora_B[:, 3:].any()
        assert layer.lora_A[0].any()


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_a_training_step_and_the_state_dict(init):
    dense = linear()
    layer = QLinear.from_linear(dense, rank=R, init=init)
    x, target = torch.randn(16, K), torch.randn(16, N)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=1e-4)
    first = nn.functional.mse_loss(layer(x), target)
    first.backward()
    optimizer.step()
    assert nn.functional.mse_loss(layer(x), target) < first
    other = QLinear(K, N, rank=R)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


# --- convert ----------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = linear(), linear()
        self.two.weight = self.one.weight


@pytest.mark.parametrize("init", ["loftq_niter_2", "pissa", "pissa_niter_2", "gaussian"])
def test_convert_with_a_shared_weight(init):
    model = Tied()
    dense = model.one.weight.detach().clone()
    fastlora.convert(model, rank=R, alpha=12, init=init, progress=False)
    assert model.one.weight is model.two.weight
    assert model.one.lora_A is not model.two.lora_A
    plain = (quantize_nf4(dense).dequantize() - dense).norm().item()
    if init != "gaussian":
        assert torch.equal(model.one.lora_B, model.two.lora_B)
        assert distance(model.one, dense) == distance(model.two, dense) < 0.8 * plain
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == [
        "one.lora_A", "one.lora_B", "two.lora_A", "two.lora_B",
    ]  # fmt: skip


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["svd", "pissa_niter_0", "pissa_niter_", "loftq_3", None])
def test_unknown_names(init):
    with pytest.raises(ValueError, match=r"from_linear: expected init 'default', .*, got "):
        QLinear.from_linear(linear(), init=init)
    model = Tied()
    with pytest.raises(ValueError, match="convert: expected init 'default'"):
        fastlora.convert(model, init=init, progress=False)
    assert type(model.one) is nn.Linear


def test_what_cannot_start():
    for kwargs in ({"rank": 0}, {"alpha": 0}, {"alpha": -1}):
        with pytest.raises(ValueError, match="expected rank >= 1 and alpha > 0 for init 'loftq', got"):
            QLinear.from_linear(linear(), **kwargs, init="loftq")
    with pytest.raises(ValueError, match="expected rank >= 1 and alpha > 0 for init 'pissa', got 0 and 32"):
        fastlora.convert(Tied(), rank=0, init="pissa", progress=False)
    with pytest.raises(ValueError, match="reset_adapter: expected init 'default' or 'gaussian', got 'pissa'"):
        QLinear(K, N).reset_adapter("pissa")
    with pytest.raises(
        ValueError, match=r"set_adapter_values: expected lora_b of shape \(40, 2\), got \(40, 3\)"
    ):
        QLinear(K, N, rank=2).set_adapter_values(torch.zeros(2, K), torch.zeros(N, 3))
    with pytest.raises(ValueError, match="loftq: expected iterations >= 1, got 0"):
        loftq(matrix(), 2, iterations=0)
    with pytest.raises(ValueError, match="loftq: expected a scaling other than 0, got 0"):
        loftq(matrix(), 2, scaling=0)
    with pytest.raises(ValueError, match="pissa: expected a scaling above 0, got -1"):
        pissa(matrix(), 2, scaling=-1)


@pytest.mark.parametrize("init", ["loftq", "pissa", "pissa_niter_2"])
def test_not_finite(init):
    dense = linear()
    with torch.no_grad():
        dense.weight[3, 5] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        QLinear.from_linear(dense, init=init)


def test_on_meta_nothing_is_computed():
    with torch.device("meta"):
        dense = nn.Linear(K, N)
    layer = QLinear.from_linear(dense, rank=R, init="pissa")
    assert layer.lora_A.is_meta
