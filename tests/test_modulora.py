"""ModuLinear: adapters on any quantiser's weights, against float64, and the quantisers that there are."""

import copy
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from tolerances import TOLERANCES, relative_error
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import QLinear, reference
from fastlora.methods import merging
from fastlora.methods.modulora import ModuLinear
from fastlora.methods.quantizers import NF4, Int4, Int8, QuantizedWeight, Quantizer
from fastlora.methods.slab_linear import slab_linear

K, N, R = 75, 40, 4
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Codebook(Quantizer):
    """Somebody else's kind: a table of 16 values, and which of them a weight is."""

    def quantize(self, weight):
        book = torch.quantile(weight.float().flatten(), torch.linspace(0, 1, 16))
        return {"codes": (weight[..., None] - book).abs().argmin(-1).to(torch.uint8), "book": book}

    def dequantize(self, parts, shape, rows, dtype):
        return parts["book"].to(dtype)[parts["codes"][rows].long()]


class WholeOnly(Quantizer):
    """A format that gives the whole matrix and nothing less, and whose weights come quantised: columns in an
    order of their own, a scale for all."""

    def row_step(self, shape):
        return shape[0]

    def dequantize(self, parts, shape, rows, dtype):
        return (parts["codes"] * parts["scale"])[:, parts["order"]].to(dtype)[rows]


class NF4InSlabs(NF4):
    """Without its kernel."""

    def linear(self, *args):
        return None


@dataclass(eq=False)
class Counting(Quantizer):
    """What is asked of another quantiser."""

    of: Quantizer
    sizes: list = field(default_factory=list)

    def quantize(self, weight):
        return self.of.quantize(weight)

    def row_step(self, shape):
        return self.of.row_step(shape)

    def dequantize(self, parts, shape, rows, dtype):
        dense = self.of.dequantize(parts, shape, rows, dtype)
        self.sizes.append(dense.numel())
        return dense


QUANTIZERS = [NF4(), NF4InSlabs(32, False), NF4InSlabs(), Int8(), Int4(32), Int4(128), Codebook()]


def named(quantizer):
    return repr(quantizer) if type(quantizer) in {NF4, Int4, Int8} else type(quantizer).__name__


def trained(quantizer, n=N, k=K, *, dtype=torch.float32, bias=True, slab=512, **options):
    """A layer whose adapter has moved, dequantised in many slabs."""
    torch.manual_seed(0)
    dense = nn.Linear(k, n, bias, dtype=dtype)
    layer = ModuLinear.from_linear(dense, quantizer, **{"rank": R, "alpha": 8} | options)
    if layer.rank:
        nn.init.normal_(layer.lora_B, std=0.1)
    layer.slab_elements = slab
    return layer


def in_double(layer, x, seen=None):
    """The equation's result and its leaves x, A, B and bias, all float64. seen: dropout's mask over x."""
    w = layer.dequantize(torch.float32).double()
    leaves = [
        None if t is None else t.detach().double().requires_grad_()
        for t in (x, layer.lora_A, layer.lora_B, layer.bias)
    ]
    xd, a, b, bias = leaves
    y = xd @ w.T + (0 if bias is None else bias)
    if a is not None:
        y = y + layer.scaling * (xd if seen is None else xd * seen) @ a.T @ b.T
    return y, leaves


def bits(t):
    return t.detach().contiguous().view(torch.uint8)


# --- the layer against float64 ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=named)
def test_the_equation_and_its_gradients(quantizer, dtype):
    layer = trained(quantizer)
    x = torch.randn(3, 5, K).to(dtype).requires_grad_()
    dy = torch.randn(3, 5, N).to(dtype)
    want, leaves = in_double(layer, x)
    got = layer(x)
    tolerance = 1.5 * TOLERANCES[dtype].frobenius  # results are rounded once a slab in 16 bits
    assert got.dtype == dtype
    assert relative_error(got.detach(), want.detach()) < tolerance
    with torch.no_grad():
        assert torch.equal(layer(x), got)
    got.backward(dy)
    want.backward(dy.double())
    for name, mine, theirs in zip(
        ("dx", "dA", "dB", "dbias"), (x, layer.lora_A, layer.lora_B, layer.bias), leaves, strict=True
    ):
        assert mine.grad.dtype == mine.dtype, name
        assert relative_error(mine.grad, theirs.grad) < tolerance, name
    assert not any(p.requires_grad or p.grad is not None for p, _ in layer.stored())


@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "bias"), [(0, 40, 75, 4, True), (1, 1, 1, 1, False), (9, 7, 130, 3, True)]
)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=named)
def test_shapes(quantizer, m, n, k, rank, bias):
    layer = trained(quantizer, n, k, rank=rank, bias=bias)
    x = torch.randn(m, k, requires_grad=True)
    want, leaves = in_double(layer, x)
    got = layer(x)
    got.sum().backward()
    want.sum().backward()
    for mine, theirs in zip((x, layer.lora_A, layer.lora_B, layer.bias), leaves, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.detach().double(), want.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learns", ["x", "lora_A", "lora_B", "bias"])
def test_one_gradient_at_a_time(learns):
    layer = trained(Int4())
    x = torch.randn(6, K)
    want, leaves = in_double(layer, x)
    layer.requires_grad_(False)
    (x if learns == "x" else layer.get_parameter(learns)).requires_grad_()
    layer(x).square().sum().backward()
    want.square().sum().backward()
    for name, mine, theirs in zip(
        ("x", "lora_A", "lora_B", "bias"), (x, layer.lora_A, layer.lora_B, layer.bias), leaves, strict=True
    ):
        if name == learns:
            assert relative_error(mine.grad, theirs.grad) < 1e-5
        else:
            assert mine.grad is None


@pytest.mark.parametrize("quantizer", [NF4(), Int8(), Codebook()], ids=named)
def test_dropout_is_of_the_adapters_input(quantizer):
    layer = trained(quantizer, dropout=0.4)
    x = torch.randn(6, K, requires_grad=True)
    torch.manual_seed(7)
    got = layer(x)
    torch.manual_seed(7)
    seed = torch.randint(2**62, (1,), dtype=torch.int64).item()
    seen = reference.lora_dropout(torch.ones(6, K), seed, 0.4).double()
    assert 0.3 < (seen == 0).double().mean() < 0.5
    want, leaves = in_double(layer, x, seen)
    assert relative_error(got.detach(), want.detach()) < 1e-5
    got.square().sum().backward()
    want.square().sum().backward()
    for mine, theirs in zip((x, layer.lora_A, layer.lora_B, layer.bias), leaves, strict=True):
        assert relative_error(mine.grad, theirs.grad) < 1e-5
    layer.eval()
    assert relative_error(layer(x).detach(), in_double(layer, x)[0].detach()) < 1e-5
    layer.train()
    with torch.no_grad():
        torch.manual_seed(7)
        assert torch.equal(layer(x), got)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nf4_is_qlinear(dtype, dropout):
    """Bit for bit, forward and backward."""
    dense = nn.Linear(K, N, dtype=dtype)
    options = {"rank": R, "alpha": 8, "dropout": dropout}
    mine, theirs = ModuLinear.from_linear(dense, NF4(), **options), QLinear.from_linear(dense, **options)
    assert torch.equal(mine.dequantize(), theirs.dequantize(torch.float32))
    theirs.set_adapter_values(mine.lora_A, torch.randn(N, R))
    mine.set_adapter_values(theirs.lora_A, theirs.lora_B)
    assert torch.equal(mine.merged_weight(), theirs.merged_weight())
    grads = []
    for layer in (mine, theirs):
        x = torch.randn(6, K, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        torch.manual_seed(1)
        y = layer(x)
        y.float().square().sum().backward()
        grads.append((y, x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.bias.grad))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [NF4(), Int8(), Int4(), Codebook()], ids=named)
def test_a_slab_is_all_that_is_dequantised(of):
    n, k = 96, 80
    counting = Counting(of)
    layer = trained(counting, n, k)
    step = of.row_step((n, k))
    most = max(512 // (k * step), 1) * step * k
    assert step * k <= most < n * k // 4
    x = torch.randn(5, k, requires_grad=True)
    y = layer(x)
    assert sum(counting.sizes) == n * k
    y.sum().backward()
    assert sum(counting.sizes) == 2 * n * k
    assert max(counting.sizes) == most
    layer.dequantize()
    assert max(counting.sizes) == most


def test_what_is_kept_for_backward():
    """The quantised tensors, the adapter, and x and u where they are needed: no W in floats."""

    def kept(layer, x):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            layer(x)
        return {(tuple(t.shape), t.dtype) for t in found}

    layer = trained(Int4(), dropout=0.1)
    x = torch.randn(6, K)
    quantized = {(tuple(p.shape), p.dtype) for p in layer.quantized_weight.parts.values()}
    pair = {((R, K), torch.float32), ((N, R), torch.float32)}
    seed, u, whole_x = ((1,), torch.int64), ((6, R), torch.float32), ((6, K), torch.float32)
    assert kept(layer, x) == quantized | pair | {seed, u, whole_x}
    layer.lora_A.requires_grad_(False)
    assert kept(layer, x) == quantized | pair | {seed, u}
    layer.lora_B.requires_grad_(False)
    assert kept(layer, x) == quantized | pair | {seed}  # for the bias and x there is dy


# --- other people's formats -------------------------------------------------------------------------------


def test_a_format_that_gives_the_whole_matrix_or_nothing():
    order = torch.randperm(K)
    parts = {
        "codes": torch.randint(-8, 8, (N, K), dtype=torch.int8),
        "scale": torch.tensor(0.03),
        "order": order,
    }
    counting = Counting(WholeOnly())
    layer = ModuLinear(counting, parts, K, N, torch.randn(N), rank=R)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(6, K, requires_grad=True)
    want, (leaf, *_) = in_double(layer, x)
    assert torch.equal(layer.dequantize(), (parts["codes"] * 0.03)[:, order])
    counting.sizes.clear()
    got = layer(x)
    got.sum().backward()
    want.sum().backward()
    assert counting.sizes == [N * K, N * K]
    assert relative_error(got.detach(), want.detach()) < 1e-5
    assert relative_error(x.grad, leaf.grad) < 1e-5
    with pytest.raises(NotImplementedError, match=r"WholeOnly.quantize: expected a quantiser that quantises"):
        ModuLinear.from_linear(nn.Linear(K, N), WholeOnly())


def test_another_librarys_format():
    """bitsandbytes' FP4, through its public functions."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional

    class FP4(Quantizer):
        def quantize(self, weight):
            packed, state = bnb.quantize_fp4(weight)
            return {"packed": packed, "absmax": state.absmax, "code": state.code}

        def row_step(self, shape):
            return shape[0]

        def dequantize(self, parts, shape, rows, dtype):
            state = bnb.QuantState(
                parts["absmax"], shape, parts["code"], blocksize=64, quant_type="fp4", dtype=dtype
            )
            return bnb.dequantize_fp4(parts["packed"], state)[rows]

    layer = trained(FP4(), N, 64)
    x = torch.randn(6, 64, requires_grad=True)
    want, (leaf, *_) = in_double(layer, x)
    got = layer.half().float()(x)
    got.sum().backward()
    want.sum().backward()
    assert relative_error(got.detach(), want.detach()) < 1e-3  # the adapter was in float16
    assert relative_error(x.grad, leaf.grad) < 1e-3


def test_what_a_quantiser_must_give():
    class Wrong(Codebook):
        def dequantize(self, parts, shape, rows, dtype):
            return self.change(super().dequantize(parts, shape, rows, dtype))

    layer = trained(Wrong(), slab=1)
    for change, what in (
        (lambda w: w.T, r"\(75, 1\) of torch.float32"),
        (torch.Tensor.double, r"\(1, 75\) of torch.float64"),
    ):
        layer.quantizer.change = change
        with pytest.raises(
            ValueError,
            match=rf"Wrong.dequantize: expected \(1, 75\) of torch.float32 for rows 0 to 1, got {what}",
        ):
            layer(torch.zeros(2, K))


# --- the quantisers ---------------------------------------------------------------------------------------


WEIGHTS = {
    "normal": torch.randn,
    "positive": lambda n, k: torch.rand(n, k) + 3,
    "negative": lambda n, k: -torch.rand(n, k),
    "sparse": lambda n, k: F.dropout(torch.randn(n, k), 0.9),
    "a row of zeros": lambda n, k: torch.randn(n, k) * (torch.arange(n) % 2)[:, None],
    "large": lambda n, k: (torch.rand(n, k) - 0.5) * torch.finfo(torch.float32).max,
    "small": lambda n, k: torch.randn(n, k) * 1e-30,
    "bfloat16": lambda n, k: torch.randn(n, k, dtype=torch.bfloat16),
    "transposed": lambda n, k: torch.randn(k, n).T,
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize(("n", "k"), [(7, 64), (5, 33), (3, 200), (1, 1)])
def test_rounding_of_int8(n, k, weight):
    torch.manual_seed(0)
    w = weight(n, k)
    parts = Int8().quantize(w)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in parts.items()} == {
        "codes": (torch.int8, (n, k)),
        "scales": (torch.float32, (n, 1)),
    }
    got = Int8().dequantize(parts, (n, k), slice(0, n), torch.float32).double()
    scale = w.double().abs().amax(1, keepdim=True) / 127
    assert ((got - w.double()).abs() <= scale * (0.5 + 1e-4)).all()
    assert (got[w == 0] == 0).all()


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("group_size", [1, 32, 64])
@pytest.mark.parametrize(("n", "k"), [(7, 64), (5, 33), (3, 200), (1, 1)])
def test_rounding_of_int4(n, k, group_size, weight):
    torch.manual_seed(0)
    w, quantizer, groups = weight(n, k), Int4(group_size), -(-k // group_size)
    parts = quantizer.quantize(w)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in parts.items()} == {
        "codes": (torch.uint8, (n, (k + 1) // 2)),
        "zeros": (torch.uint8, (n, groups)),
        "scales": (torch.float32, (n, groups)),
    }
    assert parts["zeros"].max() <= 15
    got = quantizer.dequantize(parts, (n, k), slice(0, n), torch.float32).double()
    for first in range(0, k, group_size):
        group = w[:, first : first + group_size].double()
        scale = (group.amax(1).clamp(min=0) - group.amin(1).clamp(max=0)) / 15
        off = (got[:, first : first + group_size] - group).abs()
        assert (off <= scale[:, None] * (0.5 + 1e-4)).all()
    assert (got[w == 0] == 0).all()


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=named)
@pytest.mark.parametrize("dtype", FLOATS)
def test_slabs_are_the_weight(quantizer, dtype):
    """Rows by themselves are those of the matrix, rounded once to the dtype that is asked for."""
    weight = torch.randn(70, K)
    whole = QuantizedWeight(quantizer, quantizer.quantize(weight), (70, K))
    dense = whole.rows(slice(0, 70), torch.float32)
    for elements in (1, 1000, 2**20):
        slabs = list(whole.slabs(dtype, elements))
        assert [rows.start for rows, _ in slabs] == [0, *(rows.stop for rows, _ in slabs[:-1])]
        assert torch.equal(torch.cat([slab for _, slab in slabs]), dense.to(dtype))
    assert torch.equal(whole.dequantize(dtype), dense.to(dtype))
    if isinstance(quantizer, NF4):
        options = {"blocksize": quantizer.blocksize, "double_quant": quantizer.double_quant}
        assert torch.equal(dense, fastlora.quantize_nf4(weight, **options).dequantize())


def test_bits_a_weight():
    for quantizer, size in ((NF4(), 4.127), (Int8(), 8 + 32 / 1024), (Int4(64), 4.625), (Int4(128), 4.3125)):
        layer = ModuLinear.from_linear(nn.Linear(1024, 64), quantizer)
        assert 8 * layer.quantized_weight.nbytes / 2**16 == pytest.approx(size, abs=2e-3)
        assert f"{quantizer}, in_features=1024, out_features=64, bias=True, rank=16" in repr(layer)
        assert "bits/weight" in repr(layer)


# --- a module among modules -------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=named)
def test_casting_leaves_codes_and_scales(quantizer):
    layer = trained(quantizer)
    before = layer.dequantize()
    state = {name: p.clone() for name, p in layer.state_dict().items() if name.startswith("weight_")}
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        cast(layer)
        assert torch.equal(layer.dequantize(), before)
        assert all(torch.equal(layer.state_dict()[name], p) for name, p in state.items())
    assert layer.half().lora_A.dtype == layer.bias.dtype == torch.float16
    x = torch.randn(3, K).half()
    assert relative_error(layer(x).detach(), in_double(layer, x)[0].detach()) < 2e-3


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=named)
def test_state_and_copies(quantizer):
    layer, x = trained(quantizer), torch.randn(3, K)
    other = ModuLinear.from_linear(nn.Linear(K, N), quantizer, rank=R, alpha=8)
    assert not torch.equal(other.dequantize(), layer.dequantize())
    other.load_state_dict(layer.state_dict())
    other.slab_elements = layer.slab_elements
    copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for one in (other, copied, pickled):
        assert torch.equal(one.dequantize(), layer.dequantize())
        assert torch.equal(one(x), layer(x))
        assert one.lora_A.data_ptr() != layer.lora_A.data_ptr()
    broken = {**layer.state_dict(), "weight_codes": torch.zeros(N, K)}
    if "weight_codes" in layer.state_dict():
        with pytest.raises(
            RuntimeError, match=r"ModuLinear: expected weight_codes in torch.u?int8, got torch.float32"
        ):
            layer.load_state_dict(broken)


def test_what_comes_out_of_quantising_belongs_to_the_layer():
    dense = nn.Linear(K, N, dtype=torch.bfloat16).eval()
    dense.bias.requires_grad_(False)
    layer = ModuLinear.from_linear(dense, Int8(), rank=R, init="gaussian")
    assert not layer.training
    assert not layer.bias.requires_grad
    assert layer.bias.dtype == torch.bfloat16
    assert layer.bias.data_ptr() != dense.bias.data_ptr()
    assert layer.lora_A.dtype == torch.float32
    assert layer.lora_A.std().item() == pytest.approx(1 / R, rel=0.2)
    assert not layer.lora_B.any()
    base = ModuLinear.from_linear(dense, Int8(), rank=0)
    assert base.adapter_names == ()
    x = torch.randn(3, K)
    assert torch.equal(base(x), layer(x))
    assert "rank=0" in repr(base)
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(base(x), layer(x))
    layer.set_adapter(None)
    assert torch.equal(base(x), layer(x))
    assert torch.equal(layer.merged_weight(), base.dequantize())


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=named)
def test_autocast_is_qlinears(quantizer):
    layer = trained(quantizer)
    plain = QLinear(K, N, rank=R)
    for one in (layer, plain):
        x = torch.randn(3, K, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = one(x)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert [t.grad.dtype for t in (x, one.lora_A, one.lora_B, one.bias)] == [torch.float32] * 4
    x = torch.randn(3, K)
    with torch.autocast("cpu", torch.bfloat16):
        under = layer(x)
    assert torch.equal(under, layer(x.bfloat16()))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=named)
def test_checkpointing(quantizer):
    layer = trained(quantizer, dropout=0.3)
    grads = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        x = torch.ones(3, K, requires_grad=True)
        torch.manual_seed(5)
        call(x).square().sum().backward()
        grads.append([x.grad, layer.lora_A.grad, layer.lora_B.grad])
        layer.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("quantizer", [NF4(), Int4(), Codebook()], ids=named)
def test_compile(quantizer):
    torch._dynamo.reset()
    layer = trained(quantizer, slab=2**20)
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x = torch.ones(3, K, requires_grad=True)
        y = call(x)
        y.square().sum().backward()
        results.append([y, x.grad, layer.lora_A.grad, layer.lora_B.grad])
        layer.zero_grad()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_meta():
    layer = ModuLinear.from_linear(nn.Linear(K, N, device="meta"), Int4(), rank=R)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(3, K, device="meta")).shape == (3, N)
    with pytest.raises(RuntimeError, match="slab_linear: expected codes on cpu, got meta"):
        layer(torch.empty(3, K))


def test_there_is_no_second_derivative():
    layer = trained(Int8())
    x = torch.randn(3, K, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="expected one differentiation, got a second one"):
        dx.sum().backward()


# --- with the rest of the package -------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


def converted(quantizer, **options):
    torch.manual_seed(0)
    net = Net()
    report = fastlora.convert(
        net, rank=R, layer_class=ModuLinear, quantizer=quantizer, progress=False, **options
    )
    return net, report


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=named)
def test_training_lowers_a_loss(quantizer):
    net, report = converted(quantizer)
    assert [type(one) for one in (net.up, net.down)] == [ModuLinear] * 2
    learns = [name for name, p in net.named_parameters() if p.requires_grad]
    assert learns == ["up.lora_A", "up.lora_B", "down.lora_A", "down.lora_B"]
    assert report.trainable == 2 * R * (64 + 96)
    assert report.total == report.trainable + 2 * 64 * 96 + 64 + 96
    assert report.converted[0].bytes_after == net.up.quantized_weight.nbytes
    x, target = torch.randn(64, 64), torch.randn(64, 64)
    base = net.up.dequantize()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(net(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(net.up.dequantize(), base)


def test_files_are_loras(tmp_path):
    """What is learnt over one format loads over another."""
    net, _ = converted(Int8(), alpha=12, use_rslora=True)
    for layer in (net.up, net.down):
        nn.init.normal_(layer.lora_B)
    fastlora.save_adapter(net, tmp_path)
    other, _ = converted(Int4(), alpha=5)
    plain = Net()
    fastlora.convert(plain, rank=R, progress=False)
    for one in (other, plain):
        fastlora.load_adapter(one, tmp_path)
        for mine, theirs in ((one.up, net.up), (one.down, net.down)):
            assert torch.equal(mine.lora_A, theirs.lora_A)
            assert torch.equal(mine.lora_B, theirs.lora_B)
            assert mine.scaling == theirs.scaling == 12 / R**0.5
    with pytest.raises(RuntimeError, match="load_adapter: expected plain LoRA layers, got 2 that are not"):
        fastlora.load_adapter(other, tmp_path, name="named")
    other, _ = converted(Int8(), alpha=12)
    other.up.lora_A = nn.Parameter(torch.empty(R + 1, 64))
    with pytest.raises(ValueError, match=r"expected \(5, 64\), got \(4, 64\)"):
        fastlora.load_adapter(other, tmp_path)
    meta = copy.deepcopy(net).to("meta")
    with pytest.raises(RuntimeError, match="load_adapter: expected materialised layers, got 2 that are not"):
        fastlora.load_adapter(meta, tmp_path)


def test_convert_keeps_ties():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    net[1].weight = net[0].weight
    fastlora.convert(net, rank=R, layer_class=ModuLinear, quantizer=Int4(), progress=False)
    assert net[0].weight_codes is net[1].weight_codes
    assert net[0].weight_scales is net[1].weight_scales
    assert net[0].lora_A is not net[1].lora_A
    net = nn.Sequential(net[0], nn.Linear(64, 32))
    fastlora.convert(net, rank=R, progress=False)  # the second by NF4; the first stays, and goes on learning
    assert [type(layer) for layer in net] == [ModuLinear, QLinear]
    assert net[0].lora_A.requires_grad


def test_dense_again():
    net, _ = converted(Codebook())
    nn.init.normal_(net.up.lora_B)
    x = torch.randn(3, 64)
    want = net(x)
    assert merging.make_dense(net, torch.float32) == 2
    assert type(net.up) is nn.Linear
    torch.testing.assert_close(net(x), want)
    with pytest.raises(ValueError, match="make_dense: expected a module that holds layers, got a layer"):
        merging.make_dense(trained(Int8()))


# --- what is refused --------------------------------------------------------------------------------------


def test_arguments_that_are_refused():
    dense, parts = nn.Linear(K, N), Int8().quantize(torch.randn(N, K))
    for quantizer, what in ((Int8, "Int8, a class"), ("int8", "str"), (None, "NoneType")):
        with pytest.raises(
            TypeError, match=rf"expected an object of a class derived from Quantizer, got {what}$"
        ):
            ModuLinear.from_linear(dense, quantizer)
    for wrong in ({}, {"codes": 3}, {"a.b": torch.zeros(3)}, {3: torch.zeros(3)}):
        with pytest.raises(ValueError, match="expected parts as tensors by names that are identifiers, got"):
            ModuLinear(Int8(), wrong, K, N)
    with pytest.raises(RuntimeError, match=r"expected parts on one device, got \['cpu', 'meta'\]"):
        ModuLinear(Int8(), parts | {"scales": parts["scales"].to("meta")}, K, N)
    for error, message, arguments, options in (
        (TypeError, "ModuLinear: expected in_features as an int, got 2.0", (2.0, N), {}),
        (ValueError, "ModuLinear: expected out_features >= 1, got 0", (K, 0), {}),
        (ValueError, r"expected a bias of shape \(40,\), got \(75,\)", (K, N, torch.zeros(K)), {}),
        (TypeError, "ModuLinear: expected rank as an int, got 1.5", (K, N), {"rank": 1.5}),
        (ValueError, "ModuLinear: expected rank >= 1, got -1", (K, N), {"rank": -1}),
        (ValueError, "ModuLinear: expected a finite alpha, got nan", (K, N), {"alpha": float("nan")}),
        (ValueError, r"expected dropout in \[0, 1\), got 1.0", (K, N), {"dropout": 1.0, "rank": 0}),
        (TypeError, "expected adapter_dtype float32", (K, N), {"adapter_dtype": torch.int8}),
    ):
        with pytest.raises(error, match=message):
            ModuLinear(Int8(), parts, *arguments, **options)
    with pytest.raises(TypeError, match=r"from_linear: expected a torch.nn.Linear, got Conv1d"):
        ModuLinear.from_linear(nn.Conv1d(3, 3, 1), Int8())
    with pytest.raises(TypeError, match=r"expected a matrix of float32.* got \(40, 75\) of torch.float64"):
        ModuLinear.from_linear(nn.Linear(K, N, dtype=torch.float64), Int8())
    with pytest.raises(ValueError, match="from_linear: expected init 'default' or 'gaussian', got 'loftq'"):
        ModuLinear.from_linear(dense, Int8(), init="loftq")
    with pytest.raises(ValueError, match=r"NF4: expected blocksize in .* got 48"):
        NF4(48)
    for size in (0, 2.0):
        with pytest.raises(ValueError, match=f"Int4: expected group_size >= 1 as an int, got {size}"):
            Int4(size)
    with torch.no_grad():
        dense.weight[3, 5] = float("nan")
    for quantizer, name in ((NF4(), "nf4_quantize"), (Int8(), "Int8"), (Int4(), "Int4")):
        with pytest.raises(ValueError, match=rf"{name}: expected finite weights, got 1 .* index \(3, 5\)"):
            ModuLinear.from_linear(dense, quantizer)


def test_calls_that_are_refused():
    layer = trained(Int8())
    for x in (torch.zeros(3, K + 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"ModuLinear: expected x of shape \(..., 75\), got"):
            layer(x)
    with pytest.raises(TypeError, match="slab_linear: expected x in float32, bfloat16 or float16, got"):
        layer(torch.zeros(3, K, dtype=torch.float64))
    weight, a, b = layer.quantized_weight, layer.lora_A, layer.lora_B
    x = torch.zeros(3, K)
    with pytest.raises(ValueError, match=r"slab_linear: expected bias of shape \(40,\)"):
        slab_linear(x, weight, torch.zeros(K), a, b, 1.0)
    with pytest.raises(ValueError, match=r"slab_linear: expected lora_b of shape \(40, 4\)"):
        slab_linear(x, weight, None, a, b[:3], 1.0)
    with pytest.raises(ValueError, match=r"slab_linear: expected dropout in \[0, 1\), got 1"):
        slab_linear(x, weight, None, a, b, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"ModuLinear.share_base: expected a layer like"):
        layer.share_base(trained(Int4()))
    for op, call in (
        ("add_adapter", lambda: layer.add_adapter("other", 4, 8)),
        ("adapters", fastlora.adapters(layer, ["default"] * 3).__enter__),
    ):
        with pytest.raises(RuntimeError, match=f"{op}: expected a layer with plain LoRA, got ModuLinear"):
            call()


def test_a_calibration_is_the_quantizers_own():
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(
        ValueError, match="expected calibrate with QLinear or a kind of it, got 'icq' with ModuLin"
    ):
        fastlora.convert(model, layer_class=ModuLinear, quantizer=Int8(), calibrate="icq", progress=False)
    assert type(model[0]) is nn.Linear
