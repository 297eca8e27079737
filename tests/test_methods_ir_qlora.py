"""IR-QLoRA: ICQ, held to a search that quantises for every candidate, and IEC, to its equation."""

import math

import pytest
import torch
from tolerances import TOLERANCES, relative_error
from torch import nn
from torch.nn import functional as F

import fastlora
from fastlora import QLinear, quantize_nf4, reference
from fastlora.methods.icq import icq_offsets, quantize_icq
from fastlora.methods.iec import IecQLinear, group_means
from fastlora.methods.qa_lora import QALoraQLinear
from fastlora.methods.reparametrised import make_plain

K, N, R = 128, 48, 4


def draw(n=N, k=K, dtype=torch.float32, skew=True):
    """Weights whose blocks lean to one side, each to another degree."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=generator)
    if skew:
        lean = torch.rand(n, k // 32, generator=generator).repeat_interleave(32, 1)
        w = w + lean * w.square()
    return (0.02 * w).to(dtype)


# --- ICQ --------------------------------------------------------------------------------------------------


def entropy(weight, tau, blocksize):
    """Bits that the codes of each block say, quantised about tau by the reference: float64 (blocks,)."""
    blocks = weight.float().reshape(-1, blocksize) - tau.reshape(-1, 1)
    codes, _ = reference.nf4_quantize(blocks, blocksize)
    p = F.one_hot(codes.reshape(-1, blocksize).long(), 16).sum(1).double() / blocksize
    return -(p * p.clamp(min=1e-300).log2()).sum(1)


@pytest.mark.parametrize(
    ("dtype", "blocksize", "skew"),
    [
        (torch.float32, 64, False),
        (torch.float32, 32, True),
        (torch.bfloat16, 64, True),
        (torch.float16, 128, True),
    ],
)
def test_the_search_finds_what_quantising_for_every_candidate_finds(dtype, blocksize, skew):
    weight = draw(8, 256, dtype, skew)
    found = icq_offsets(weight, blocksize=blocksize)
    assert found.shape == (8, 256 // blocksize)
    assert found.dtype == torch.float32
    blocks = weight.float().reshape(-1, blocksize)
    median = blocks.median(1).values
    reach = (blocks - median[:, None]).abs().amax(1)
    sigma = 1 / 1.848131
    best, tau = None, None
    for factor in torch.linspace(-0.1 * sigma, 0.1 * sigma, 201).tolist():
        candidate = median + factor * reach
        now = entropy(weight, candidate, blocksize)
        if best is None:
            best, tau = now, candidate
        better = now > best + 1e-9
        best, tau = torch.where(better, now, best), torch.where(better, candidate, tau)
    got = entropy(weight, found.flatten(), blocksize)
    # A weight within a rounding of a midpoint may be counted on its other side.
    assert (got >= best - 1e-9).double().mean() > 0.95
    assert (got - best).abs().max() < 0.1
    assert torch.isclose(found.flatten(), tau, rtol=1e-4, atol=1e-6).double().mean() > 0.9
    assert got.mean() > entropy(weight, torch.zeros(len(blocks)), blocksize).mean() + 0.02


def test_degenerate_blocks():
    weight = torch.zeros(3, 64)
    weight[1] = 0.25
    weight[2, 0] = 1.0
    quantised = quantize_icq(weight)
    assert torch.equal(
        quantised.offset_values, torch.tensor([[0.0], [0.25], quantised.offset_values[2].tolist()])
    )
    torch.testing.assert_close(quantised.dequantize(), weight, rtol=0, atol=0.06)
    assert torch.equal(quantised.dequantize()[:2], weight[:2])
    assert icq_offsets(torch.zeros(0, 64)).shape == (0, 1)
    assert torch.equal(icq_offsets(weight, steps=0), torch.tensor([[0.0], [0.25], [0.0]]))


def test_it_is_closer_where_blocks_have_means():
    weight = draw(skew=False) + 0.03 * torch.randn(N, K // 64).repeat_interleave(64, 1)
    calibrated, plain = quantize_icq(weight), quantize_nf4(weight)
    errors = [relative_error(q.dequantize(), weight) for q in (calibrated, plain)]
    assert errors[0] < 0.9 * errors[1]
    assert calibrated == quantize_nf4(weight, offsets=icq_offsets(weight))
    assert calibrated.bits_per_weight == pytest.approx(plain.bits_per_weight + 0.5)
    assert quantize_icq(weight, blocksize=32, double_quant=False).nested is None


def test_a_layer_and_a_model():
    torch.manual_seed(0)
    dense = nn.Linear(K, N)
    with torch.no_grad():
        dense.weight.copy_(draw())
    layer = QLinear.from_linear(dense, rank=R, calibrate="icq")
    assert layer.quantized_weight == quantize_icq(dense.weight)
    x = torch.randn(5, K)
    want = x.double() @ layer.dequantize(torch.float32).double().T + dense.bias.double()
    assert relative_error(layer(x), want.detach()) < TOLERANCES[torch.float32].frobenius
    meta = QLinear.from_linear(dense, rank=R, calibrate="icq", device="meta")
    assert meta.weight_offsets.shape == layer.weight_offsets.shape == (N, 4 * K // 64)
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta(x), layer(x))

    net = nn.Sequential(dense, nn.Linear(N, N), nn.Linear(K, N, bias=False))
    net[2].weight = dense.weight
    weights = K * N + N * N + 2 * N
    report = fastlora.convert(net, ["0", "2"], rank=R, calibrate="icq", progress=False)
    assert net[0].weight_offsets is net[2].weight_offsets
    assert net[0].quantized_weight == layer.quantized_weight
    assert report.converted[0].bytes_after == layer.quantized_weight.nbytes
    assert report.total == weights + 2 * R * (K + N)
    assert report.trainable == 2 * R * (K + N)


@pytest.mark.parametrize("init", ["loftq", "loftq_niter_3", "pissa"])
def test_adapters_that_start_from_the_weight(init):
    dense = nn.Linear(K, N, bias=False)
    with torch.no_grad():
        dense.weight.copy_(draw())
    layer = QLinear.from_linear(dense, rank=16, init=init, calibrate="icq")
    assert layer.weight_offsets is not None
    start = layer.dequantize() + layer.scaling * layer.lora_B @ layer.lora_A
    assert relative_error(start.detach(), dense.weight) < relative_error(
        quantize_icq(dense.weight).dequantize(), dense.weight
    )


def test_what_icq_refuses():
    for wrong in (torch.zeros(4, 100), torch.zeros(64), torch.zeros(1, 2, 64)):
        with pytest.raises(
            ValueError, match="icq_offsets: expected a matrix whose columns are whole blocks of"
        ):
            icq_offsets(wrong)
    with pytest.raises(TypeError, match="icq_offsets: expected weight in float32, bfloat16 or float16, got"):
        icq_offsets(torch.zeros(4, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="icq_offsets: expected width >= 0 and steps >= 0, got -1 and 100"):
        icq_offsets(torch.zeros(4, 64), width=-1)
    weight = draw()
    weight[3, 5] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        quantize_icq(weight)
    dense = nn.Linear(100, 8)
    with pytest.raises(
        ValueError, match=r"QLinear.from_linear: expected calibrate None or 'icq', got 'gptq'"
    ):
        QLinear.from_linear(dense, calibrate="gptq")
    whole = "expected in_features that are whole blocks of 64 for calibrate 'icq', got 100"
    with pytest.raises(ValueError, match=f"QLinear.from_linear: {whole}"):
        QLinear.from_linear(dense, calibrate="icq")
    net = nn.Sequential(nn.Linear(64, 100), dense)
    with pytest.raises(ValueError, match=f"convert: 1: {whole}"):
        fastlora.convert(net, calibrate="icq", progress=False)
    with pytest.raises(ValueError, match="convert: expected calibrate None or 'icq', got 'gptq'"):
        fastlora.convert(net, calibrate="gptq", progress=False)
    assert type(net[0]) is nn.Linear


# --- IEC --------------------------------------------------------------------------------------------------


def trained(k=K, n=N, r=R, **options):
    torch.manual_seed(0)
    layer = IecQLinear(k, n, rank=r, alpha=2 * r, **options)
    nn.init.normal_(layer.lora_B, std=0.1)
    nn.init.constant_(layer.lora_beta_A, 0.7)
    nn.init.constant_(layer.lora_beta_B, -0.2)
    return layer


def means(t, rows):
    """The equation's pool and lift, by loops over groups."""
    columns = t.shape[-1]
    groups = math.gcd(rows, columns)
    parts = [part.mean(-1, keepdim=True) for part in t.split(columns // groups, -1)]
    return torch.cat([part.expand(*t.shape[:-1], rows // groups) for part in parts], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k", "n", "r"), [(K, N, R), (96, 40, 16), (70, 33, 4), (35, 9, 8)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_equation_and_its_gradients(dtype, k, n, r, dropout):
    layer = trained(k, n, r, dropout=dropout)
    x = torch.randn(3, 5, k, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 5, n, dtype=dtype)
    w = layer.dequantize(torch.float32).double()
    mine = [x, *layer.adapter_parameters()]
    assert len(mine) == 5
    xd, a, b, beta_a, beta_b = theirs = [t.detach().double().requires_grad_() for t in mine]
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), dropout).double()
    u = (mask * xd) @ a.T + beta_a * means(xd, r)
    want = xd @ w.T + 2 * (u @ b.T + beta_b * means(u, n)) + layer.bias.detach().double()
    torch.manual_seed(3)
    got = layer(x)
    assert got.dtype == dtype
    tolerance = 3 * TOLERANCES[dtype].frobenius
    assert relative_error(got, want.detach()) < tolerance
    got.backward(dy)
    want.backward(dy.double())
    for p, q in zip(mine[:3], theirs, strict=False):
        assert relative_error(p.grad, q.grad) < tolerance
    for p, q, beside in (
        (layer.lora_beta_A, beta_a, a),
        (layer.lora_beta_B, beta_b, b),
    ):  # sums of r·k, n·r terms
        terms = beside.grad.norm() * group_means(*beside.shape, like=beside).norm()
        assert (p.grad - q.grad).abs() < tolerance * terms


def test_group_means_are_the_authors():
    """Where the rank divides both sizes, reshaping and averaging, and repeating."""
    x = torch.randn(3, K)
    pool, lift = group_means(R, K, like=x), group_means(N, R, like=x)
    torch.testing.assert_close(x @ pool.T, x.reshape(3, R, -1).mean(-1))
    u = torch.randn(3, R)
    assert torch.equal(u @ lift.T, u.repeat_interleave(N // R, 1))


def test_it_starts_as_plain_lora_and_is_exported_as_it():
    layer = IecQLinear(K, N, rank=R)
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize(), layer.bias))
    layer = trained()
    plain = layer.plain()
    assert type(plain) is QLinear
    assert torch.equal(plain(x), layer(x))
    assert torch.equal(plain.merged_weight(), layer.merged_weight())
    layer.eval().merge()
    assert relative_error(layer(x), plain(x)) < 0.2
    layer.unmerge()
    layer.set_adapter_values(plain.lora_A, plain.lora_B)
    assert not layer.lora_beta_A.any()
    assert torch.equal(layer(x), plain(x))
    with pytest.raises(RuntimeError, match="expected a layer with plain LoRA, got IecQLinear"):
        layer.add_adapter("a", rank=2, alpha=2)
    assert IecQLinear(K, N, rank=0).lora_beta_A is None


# --- both -------------------------------------------------------------------------------------------------


def test_ir_qlora_learns_and_goes_through_files(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(K, 64), nn.Tanh(), nn.Linear(64, K))
    fastlora.convert(net, rank=R, layer_class=IecQLinear, calibrate="icq", progress=False)
    trainable = [p for p in net.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 2 * (R * (K + 64) + 2)
    x, target = torch.randn(64, K), torch.randn(64, K)
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(net(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(layer.lora_beta_A.item() and layer.lora_beta_B.item() for layer in (net[0], net[2]))
    y = net(x)

    other = nn.Sequential(IecQLinear(K, 64, rank=R), nn.Tanh(), IecQLinear(64, K, rank=R))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), y)
    fastlora.save_adapter(net, tmp_path)
    plain = nn.Sequential(QLinear(K, 64, rank=R), nn.Tanh(), QLinear(64, K, rank=R))
    for at in (0, 2):
        plain[at].share_base(net[at])
        plain[at].bias = net[at].bias
    fastlora.load_adapter(plain, tmp_path)
    assert torch.equal(plain(x), y)
    assert make_plain(net) == 2
    assert torch.equal(net(x), y)


def test_qa_lora_merges_into_a_calibrated_base():
    """Offsets of 64 columns and of 48 meet in groups of 16."""
    dense = nn.Linear(192, N)
    layer = QALoraQLinear.from_linear(dense, rank=R, group_size=48, calibrate="icq")
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(5, 192)
    folded = layer.folded()
    assert folded.weight_offsets.shape == (N, 4 * 12)
    torch.testing.assert_close(folded(x), layer(x), rtol=1e-4, atol=1e-4)
