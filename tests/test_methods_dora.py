"""DoRA on the 4-bit base."""

import copy
import pickle

import pytest
import torch
from tolerances import TOLERANCES, relative_error
from torch import nn

import fastlora
from fastlora import QLinear
from fastlora.methods import dora
from fastlora.methods.dora import DoraQLinear, RowSquares, row_norms, squared_rows
from fastlora.tiles import row_tiles

K, N, R = 72, 40, 4


def trained(seed=0, **options):
    """A layer whose adapter and magnitude have moved."""
    torch.manual_seed(seed)
    layer = DoraQLinear(K, N, rank=R, alpha=8, **options)
    nn.init.normal_(layer.lora_B, std=0.1)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(torch.rand(N) + 0.5)
    return layer


def parts(layer):
    return layer.packed_weight()


def reference(x, w, a, b, s, m, bias):
    """The equation, on its tensors; the norm is a constant."""
    changed = w + s * b @ a
    y = x @ changed.T * (m / changed.detach().norm(dim=1))
    return y if bias is None else y + bias


def doubles(layer):
    return [
        layer.dequantize(torch.float32).double(),
        layer.lora_A.detach().double(),
        layer.lora_B.detach().double(),
        layer.scaling,
        layer.lora_magnitude_vector.detach().double(),
        None if layer.bias is None else layer.bias.detach().double(),
    ]


# --- the parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "blocksize"), [(40, 72, 64), (7, 33, 64), (130, 257, 32), (1, 5, 64), (70, 64, 128)]
)
def test_tiles_are_the_weight(n, k, blocksize, double_quant):
    torch.manual_seed(0)
    weight = fastlora.quantize_nf4(torch.randn(n, k), blocksize=blocksize, double_quant=double_quant)
    packed = weight.parts
    for elements in (1, 1000, 2**20):
        tiles = list(row_tiles(packed, k, elements))
        assert [rows.start for rows, _ in tiles] == [0, *(rows.stop for rows, _ in tiles[:-1])]
        assert torch.equal(torch.cat([tile for _, tile in tiles]), weight.dequantize(torch.float32))
    want = weight.dequantize(torch.float32).double().square().sum(1)
    torch.testing.assert_close(squared_rows(packed, k).double(), want, rtol=1e-6, atol=0)


def test_a_tile_is_few_rows():
    weight = fastlora.quantize_nf4(torch.randn(96, 64))
    packed = weight.parts
    assert len(list(row_tiles(packed, 64, 640))) == 10


@pytest.mark.parametrize("size", [1e-3, 1, 30])
def test_row_norms(size):
    layer = trained()
    with torch.no_grad():
        layer.lora_B.mul_(size)
    w, a, b, s, *_ = doubles(layer)
    want = (w + s * b @ a).norm(dim=1)
    assert relative_error(layer.row_norms(), want) < 1e-6
    assert ((layer.row_norms() - want) / want).abs().max() < 1e-5


def test_row_norms_where_the_adapter_erases_a_row():
    """What the docstring says of cancellation: a bound relative to the terms, not to their sum."""
    layer = QLinear(K, N, rank=N, alpha=N)
    w = layer.dequantize(torch.float32)
    keep = torch.linspace(1e-3, 1, N)
    squares = squared_rows(parts(layer), K)
    got = row_norms(parts(layer), squares, w, torch.diag(keep - 1), 1.0).double()
    want = w.double().norm(dim=1) * keep.double()
    assert ((got**2 - want**2).abs() <= 4e-6 * w.double().square().sum(1)).all()
    assert ((got - want) / want)[keep > 0.3].abs().max() < 1e-5


def test_an_empty_row_gives_the_bias():
    dense = nn.Linear(K, N)
    with torch.no_grad():
        dense.weight[3] = 0
    layer = DoraQLinear.from_linear(dense, rank=R)
    torch.testing.assert_close(layer(torch.randn(2, K))[:, 3], dense.bias[3].expand(2))


def test_squares_follow_the_weight():
    layer, squares = trained(), RowSquares()
    first = squares.of(parts(layer), K)
    assert squares.of(parts(layer), K) is first
    assert copy.deepcopy(squares)._value is None
    layer.load_state_dict(trained(seed=1).state_dict())  # in place
    second = squares.of(parts(layer), K)
    assert torch.equal(second, squared_rows(parts(layer), K))
    assert not torch.equal(first, second)
    layer.load_state_dict(trained(seed=2).state_dict(), assign=True)
    assert torch.equal(squares.of(parts(layer), K), squared_rows(parts(layer), K))
    with torch.inference_mode():
        third = RowSquares().of(parts(layer), K)
    assert not third.is_inference()


# --- the layer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradients(dtype, bias):
    layer = trained(bias=bias)
    x = torch.randn(3, 5, K, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 5, N, dtype=dtype)
    w, *learn = doubles(layer)
    a, b, m = (learn[i].requires_grad_() for i in (0, 1, 3))
    xd = x.detach().double().requires_grad_()
    want = reference(xd, w, a, b, learn[2], m, learn[4])
    got = layer(x)
    assert got.dtype == dtype
    tolerance = 3 * TOLERANCES[dtype].frobenius
    assert relative_error(got, want.detach()) < tolerance
    got.backward(dy)
    want.backward(dy.double())
    for name, mine, theirs in (
        ("x", x, xd), ("A", layer.lora_A, a), ("B", layer.lora_B, b), ("m", layer.lora_magnitude_vector, m),
    ):  # fmt: skip
        assert relative_error(mine.grad, theirs.grad) < tolerance, name
    assert layer.weight.grad is None


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_gradients_the_kernel_multiplies(dtype, m):
    layer = trained(bias=True)
    x = torch.randn(m, K, dtype=dtype)
    want = reference(x.double(), *doubles(layer))
    with torch.no_grad():
        fused = layer(x)
    assert fused.dtype == dtype
    assert relative_error(fused, want) < TOLERANCES[dtype].frobenius
    assert relative_error(fused, want) <= 1.05 * relative_error(layer(x).detach(), want)  # rounded once


def test_the_factor_is_kept_until_something_changes(monkeypatch):
    layer, x, calls = trained(), torch.randn(2, K), []
    row_norms = dora.row_norms
    monkeypatch.setattr(dora, "row_norms", lambda *args: calls.append(1) or row_norms(*args))

    def computed() -> int:
        calls.clear()
        with torch.no_grad():
            torch.testing.assert_close(
                layer(x).double(), reference(x.double(), *doubles(layer)), rtol=1e-5, atol=1e-5
            )
        return len(calls)

    assert [computed(), computed()] == [1, 0]
    for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        p.data.mul_(1.25)  # no version counts this
        assert [computed(), computed()] == [1, 0]
    layer.set_alpha(3)
    assert [computed(), computed()] == [1, 0]
    layer.load_state_dict(trained(seed=5).state_dict())
    assert [computed(), computed()] == [1, 0]
    layer(x)
    assert len(calls) == 1, "a training call computes the norm anew"


def test_it_starts_at_the_base_and_at_every_initialisation():
    dense = nn.Linear(K, N)
    x = torch.randn(3, K)
    for init in ("default", "gaussian", "loftq", "pissa"):
        layer = DoraQLinear.from_linear(dense, rank=R, init=init)
        plain = QLinear(K, N, rank=R)
        plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "magnitude" not in k})
        torch.testing.assert_close(layer(x), plain(x))
    layer = DoraQLinear(K, N)
    assert torch.equal(layer.lora_magnitude_vector, layer.row_norms())
    layer.set_adapter(None)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias))


def test_training_lowers_a_loss():
    layer = trained(dropout=0.1)
    x, target = torch.randn(64, K), torch.randn(64, N)
    optimizer = torch.optim.AdamW(layer.adapter_parameters(), lr=1e-2)
    before = layer.lora_magnitude_vector.detach().clone()
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(layer.lora_magnitude_vector, before)


def test_dropout_is_of_what_the_factor_scales():
    layer = trained(dropout=0.5)
    x = torch.randn(2, K)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    seen = nn.functional.dropout(x, 0.5).double()
    w, a, b, s, m, bias = doubles(layer)
    changed = w + s * b @ a
    want = (x.double() - seen) @ w.T + seen @ changed.T * (m / changed.norm(dim=1)) + bias
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    layer.eval()
    torch.testing.assert_close(
        layer(x).double(), reference(x.double(), w, a, b, s, m, bias), rtol=1e-5, atol=1e-5
    )


def test_merging():
    layer = trained().eval()
    x = torch.randn(3, K)
    w, a, b, s, m, bias = doubles(layer)
    changed = w + s * b @ a
    want = changed * (m / changed.norm(dim=1))[:, None]
    torch.testing.assert_close(layer.merged_weight().double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.double() @ want.T + bias, layer(x).double(), rtol=1e-5, atol=1e-5)
    bits, before = layer.quantized_weight, layer(x)
    layer.merge()
    assert layer.quantized_weight == fastlora.quantize_nf4(want.float())
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias))
    layer.unmerge()
    assert layer.quantized_weight == bits
    assert torch.equal(layer(x), before)


def test_copies_and_state_dicts():
    layer = trained()
    x = torch.randn(3, K)
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), want)
    other = DoraQLinear(K, N, rank=R, alpha=8)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), want)
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_autocast_leaves_the_norm_in_float32():
    layer = trained()
    with torch.no_grad():
        layer.lora_B.mul_(30)
    want = layer.row_norms()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.row_norms(), want)
        assert layer(torch.randn(2, K)).dtype == torch.bfloat16


def test_compile():
    layer = trained()
    x = torch.randn(3, K)
    call = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = call(x)
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    got = layer.lora_magnitude_vector.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(got, layer.lora_magnitude_vector.grad)


# --- models and files -------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def converted(**options):
    net = Net()
    fastlora.convert(net, rank=R, alpha=8, layer_class=DoraQLinear, progress=False, **options)
    return net


def test_convert_makes_the_magnitude_learn():
    net = converted()
    names = {name.rpartition(".")[2] for name, p in net.named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B", "lora_magnitude_vector"}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_files_are_pefts(tmp_path, use_rslora):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    net = converted(use_rslora=use_rslora)
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, mean=0.5, std=0.1)
    fastlora.save_adapter(net, tmp_path / "ours")
    dense = Net()
    for name in ("up", "down"):
        dense.get_submodule(name).weight.data = net.get_submodule(name).dequantize()
    model = peft.PeftModel.from_pretrained(dense, tmp_path / "ours", is_trainable=True)
    x = torch.randn(5, 64)
    want = model(x)
    torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-4)
    want.square().mean().backward()
    net(x).square().mean().backward()
    layer, theirs = net.up, model.base_model.model.up
    for mine, other in (
        (layer.lora_A, theirs.lora_A["default"].weight),
        (layer.lora_B, theirs.lora_B["default"].weight),
        (layer.lora_magnitude_vector, theirs.lora_magnitude_vector["default"].weight),
    ):
        assert relative_error(mine.grad, other.grad) < 1e-4
    model.save_pretrained(tmp_path / "theirs")
    again = converted()
    fastlora.load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(x), net(x))


def test_what_files_cannot_hold(tmp_path):
    net = converted()
    fastlora.save_adapter(net, tmp_path / "dora")
    plain = Net()
    fastlora.convert(plain, rank=R, progress=False)
    before = plain.up.lora_A.detach().clone()
    for name in ("default", "other"):
        with pytest.raises(
            ValueError,
            match=r"expected a plain LoRA adapter, got use_dora=True in .*; convert with layer_class=",
        ):
            fastlora.load_adapter(plain, tmp_path / "dora", name=name)
    assert torch.equal(plain.up.lora_A, before)
    fastlora.save_adapter(plain, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"2 missing from the file:\n.*up.lora_magnitude_vector"):
        fastlora.load_adapter(net, tmp_path / "plain")
    with pytest.raises(RuntimeError, match="expected plain LoRA layers, got 2 that are not"):
        fastlora.load_adapter(net, tmp_path / "plain", name="other")
    net.up = plain.up
    with pytest.raises(
        ValueError, match=r"expected DoRA in every adapted layer or in none, .* got it in 1 of 2"
    ):
        fastlora.save_adapter(net, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_what_is_refused():
    layer = trained()
    for op, call in (
        ("add_adapter", lambda: layer.add_adapter("x", 2, 4)),
        ("adapters", lambda: fastlora.adapters(layer, ["default"]).__enter__()),
        ("replace_adapter", lambda: layer.replace_adapter("default", torch.ones(1, K), torch.ones(N, 1), 1)),
    ):
        with pytest.raises(RuntimeError, match=f"{op}: expected a layer with plain LoRA, got DoraQLinear"):
            call()
    with pytest.raises(ValueError, match=r"DoraQLinear: expected x of shape \(..., 72\), got \(3, 71\)"):
        layer(torch.zeros(3, 71))
    with pytest.raises(TypeError, match="convert: expected layer_class QLinear, ModuLinear or a kind"):
        fastlora.convert(Net(), layer_class="dora", progress=False)
    assert DoraQLinear(K, N, rank=0)(torch.zeros(2, K)).shape == (2, N)
