"""QA-LoRA: the pooled input, and the plain LoRA that it is."""

import copy

import pytest
import torch
from tolerances import TOLERANCES, relative_error
from torch import nn

import fastlora
from fastlora import QLinear, quantize_nf4
from fastlora.methods import merging
from fastlora.methods.qa_lora import QALoraQLinear, fold
from fastlora.methods.reparametrised import make_plain

K, N, R, G = 96, 40, 4, 32


def trained(**options):
    torch.manual_seed(0)
    layer = QALoraQLinear(K, N, rank=R, alpha=8, **options)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [1, 16, G, K])
def test_the_equation_and_its_gradients(dtype, group_size):
    layer = trained(group_size=group_size)
    assert layer.lora_A.shape == (R, K // group_size)
    x = torch.randn(3, 5, K, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 5, N, dtype=dtype)
    w = layer.dequantize(torch.float32).double()
    a, b = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B))
    xd = x.detach().double().requires_grad_()
    pooled = xd.unflatten(-1, (-1, group_size)).mean(-1)
    want = xd @ w.T + 2 * pooled @ a.T @ b.T + layer.bias.detach().double()
    got = layer(x)
    tolerance = 2 * TOLERANCES[dtype].frobenius
    assert relative_error(got, want.detach()) < tolerance
    got.backward(dy)
    want.backward(dy.double())
    for mine, theirs in ((x, xd), (layer.lora_A, a), (layer.lora_B, b)):
        assert relative_error(mine.grad, theirs.grad) < tolerance


def test_pefts_numbers():
    """PEFT has QA-LoRA for GPTQ layers alone; its variant, asked for the change of a layer."""
    variants = pytest.importorskip("peft.tuners.lora.variants", reason="PEFT is not installed")
    if not hasattr(variants, "QALoraLinearVariant"):
        pytest.skip("this PEFT has no QA-LoRA")
    layer = trained()
    theirs = nn.Module()
    low, high = nn.Linear(K // G, R, bias=False), nn.Linear(R, N, bias=False)
    low.weight, high.weight = layer.lora_A, layer.lora_B
    theirs.lora_A, theirs.lora_B = nn.ModuleDict({"default": low}), nn.ModuleDict({"default": high})
    theirs.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
    theirs.scaling, theirs.qalora_group_size, theirs.in_features = (
        {"default": layer.scaling},
        {"default": G},
        K,
    )
    x = torch.randn(7, K)
    base = nn.functional.linear(x, layer.dequantize(), layer.bias)
    got = layer(x) - base
    change = variants.QALoraLinearVariant.forward(theirs, "default", x, torch.zeros_like(base))
    torch.testing.assert_close(got * (K // G), change, rtol=1e-3, atol=1e-4)  # PEFT's scaling has k/g in it


def test_it_starts_at_its_base():
    layer = QALoraQLinear(K, N, rank=R)
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias))
    assert layer.lora_A.abs().max() <= (G / K) ** 0.5
    with torch.device("meta"):
        assert QALoraQLinear(K, N, rank=R).lora_A.shape == (R, K // G)


def test_training_and_state():
    layer = trained(dropout=0.1)
    x = torch.randn(64, K)
    pooled = x.unflatten(-1, (-1, G)).mean(-1)
    target = nn.functional.linear(x, layer.dequantize(), layer.bias) + 3 * pooled @ torch.randn(K // G, N)
    optimizer = torch.optim.AdamW(layer.adapter_parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    other = QALoraQLinear(K, N, rank=R, alpha=8).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer.eval()(x))


def test_the_plain_lora_that_it_is(tmp_path):
    layer = trained()
    x = torch.randn(3, K)
    plain = layer.plain()
    assert type(plain) is QLinear
    assert torch.equal(plain.lora_A, layer.lora_A.repeat_interleave(G, 1) / G)
    assert plain.scaling == layer.scaling
    assert torch.equal(plain(x), layer(x))
    assert torch.equal(plain.merged_weight(), layer.merged_weight())
    assert "group_size=32" in repr(layer)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(K, N)

    net, other = Net(), Net()
    net.up = layer
    fastlora.save_adapter(net, tmp_path)
    other.up = QLinear(K, N, rank=R)
    other.up.share_base(layer)
    other.up.bias = layer.bias
    fastlora.load_adapter(other, tmp_path)
    assert torch.equal(other.up(x), layer(x))
    assert make_plain(net) == 1
    assert type(net.up) is QLinear
    with pytest.raises(ValueError, match="make_plain: expected a module that holds layers, got a layer"):
        make_plain(layer)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def converted(kind=QALoraQLinear, group_size=8, seed=0):
    net = Two()
    options = {"group_size": group_size} if kind is QALoraQLinear else {}
    fastlora.convert(net, rank=R, alpha=8, layer_class=kind, progress=False, **options)
    torch.manual_seed(seed)
    for layer in (net.up, net.down):
        nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B, std=0.1)
    return net


@pytest.mark.parametrize("group_size", [8, 4, 1])
def test_a_file_is_read_back(tmp_path, group_size):
    ours = converted(group_size=group_size)
    ours.up.set_alpha(6, use_rslora=False)
    fastlora.save_adapter(ours, tmp_path)
    other = converted(group_size=group_size, seed=1)
    fastlora.load_adapter(other, tmp_path)
    for mine, theirs in ((ours.up, other.up), (ours.down, other.down)):
        assert torch.equal(theirs.lora_A, mine.lora_A)
        assert torch.equal(theirs.lora_B, mine.lora_B)
        assert theirs.scaling == mine.scaling
    x = torch.randn(3, K)
    assert torch.equal(other(x), ours(x))
    finer = converted(group_size=max(group_size // 2, 1))  # is constant over its groups too
    fastlora.load_adapter(finer, tmp_path)
    torch.testing.assert_close(finer(x), ours(x))


def test_a_file_that_is_not_constant_over_groups_is_refused(tmp_path):
    plain = converted(QLinear)
    fastlora.save_adapter(plain, tmp_path / "plain")
    net = converted(seed=1)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    message = "load_adapter: up: expected a lora_A that is constant over each group of 8 inputs, got another"
    with pytest.raises(ValueError, match=message):
        fastlora.load_adapter(net, tmp_path / "plain")
    plain.up.lora_A.data.zero_()  # is constant, and the second layer's is not
    fastlora.save_adapter(plain, tmp_path / "half")
    with pytest.raises(ValueError, match="load_adapter: down: expected a lora_A that is constant"):
        fastlora.load_adapter(net, tmp_path / "half")
    with pytest.raises(RuntimeError, match="expected plain LoRA layers, got 2 that are not: up"):
        fastlora.load_adapter(net, tmp_path / "half", name="other")
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_training_goes_on_where_it_stopped(tmp_path):
    x, target = torch.randn(32, K), torch.randn(32, K)

    def adamw(net):
        return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)

    def train(net, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), target).backward()
            optimizer.step()

    whole = converted()
    optimizer = adamw(whole)
    train(whole, optimizer)
    torch.save([whole.state_dict(), optimizer.state_dict()], tmp_path / "state")
    train(whole, optimizer)
    again = converted(seed=1)
    model, moments = torch.load(tmp_path / "state", weights_only=True)
    again.load_state_dict(model)
    optimizer = adamw(again)
    optimizer.load_state_dict(moments)
    train(again, optimizer)
    for name, t in whole.state_dict().items():
        assert torch.equal(t, again.state_dict()[name]), name


def test_convert():
    net = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    fastlora.convert(net, rank=R, layer_class=QALoraQLinear, group_size=16, init="gaussian", progress=False)
    assert [layer.lora_A.shape[1] for layer in net] == [4, 6]
    assert all(layer.lora_A.requires_grad for layer in net)


# --- merging ----------------------------------------------------------------------------------------------

PARTS = ("weight", "weight_scales", "weight_nested", "weight_offsets")


def parts(layer):
    return [getattr(layer, name) for name in PARTS]


def with_offsets(layer, groups):
    """Gives a layer a base that has offsets already."""
    values = 0.05 * torch.randn(N, groups, generator=torch.Generator().manual_seed(5))
    layer._set_base(quantize_nf4(layer.dequantize(), offsets=values))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [0, 1, 2, 4, K], ids="base of {} groups".format)
def test_merging_rounds_nothing_but_the_sum(dtype, groups):
    layer = trained() if not groups else with_offsets(trained(), groups)
    layer.eval()
    exact = layer.dequantize(torch.float32).double()
    a, b = layer.pair_in_force()
    exact += layer.scaling * b.detach().double() @ a.detach().double()
    before, unmerged = parts(layer), layer.merged_weight()
    xs = [torch.randn(rows, K, dtype=dtype) for rows in (1, 3, 8, 64)]
    ys = [layer(x) for x in xs]
    layer.merge()
    assert layer.merged
    assert layer.weight_offsets.shape == (N, 4 * {0: 3, 1: 3, 2: 6, 4: 12, K: K}[groups])
    for was, now in zip(before[:3], parts(layer)[:3], strict=True):
        assert torch.equal(was, now)
    assert relative_error(layer.merged_weight(), exact) < 1e-7
    torch.testing.assert_close(layer.merged_weight(), unmerged, rtol=1e-6, atol=1e-7)
    tolerance = 2 * TOLERANCES[dtype].frobenius
    for x, y in zip(xs, ys, strict=True):
        want = x.double() @ exact.T + layer.bias.double()
        assert layer(x).dtype == dtype
        assert relative_error(layer(x), want) < tolerance
        assert relative_error(y, want) < tolerance
    layer.unmerge()
    assert all(was is now for was, now in zip(before, parts(layer), strict=True))
    assert torch.equal(layer(xs[1]), ys[1])


def test_a_merged_layer_saves_its_original_bits():
    layer = trained().eval()
    state = copy.deepcopy(layer.state_dict())
    x = torch.randn(3, K)
    want = layer(x)
    layer.merge()
    assert layer.state_dict().keys() == state.keys()
    for name, t in layer.state_dict().items():
        assert torch.equal(t, state[name]), name
    merged = layer(x)
    torch.testing.assert_close(merged, want, rtol=1e-5, atol=1e-5)
    for other in (copy.deepcopy(layer), layer.half()):
        assert torch.equal(other(x), merged) or other is layer
        other.unmerge()
        assert other.weight_offsets is None
    layer.float().merge()
    layer.load_state_dict(state)
    assert not layer.merged
    assert torch.equal(layer.train()(x), want)


def test_merging_a_model_costs_no_rounding():
    net = nn.Sequential(trained())
    (rounding,) = merging.merge_into_nf4(net)
    assert rounding.of_weight < 1e-7
    assert rounding.of_change < 1e-6
    (plain,) = merging.merge_into_nf4(nn.Sequential(trained().plain()))
    assert plain.of_weight > 0.01  # as any other merging does


def test_a_merged_layer_with_nothing_to_merge():
    layer = QALoraQLinear(K, N, rank=0)
    layer.merge()
    assert not layer.merged
    assert layer.weight_offsets is None
    layer = trained()
    layer.set_adapter(None)
    layer.merge()
    assert not layer.merged
    assert layer.folded().weight_offsets is None


@pytest.mark.parametrize("groups", [0, 2])
def test_folding_for_good(tmp_path, groups):
    layer = trained().eval() if not groups else with_offsets(trained(), groups).eval()
    layer.bias.requires_grad_(False)
    x = torch.randn(5, K)
    layer.merge()
    want = layer(x)
    layer.unmerge()
    shared = nn.Sequential(layer)
    shared.again = layer
    assert fold(shared) == 1
    folded = shared[0]
    assert type(folded) is QLinear
    assert shared.again is folded
    assert (folded.rank, folded.training) == (0, False)
    for name in ("weight", "weight_scales", "weight_nested", "bias"):
        assert getattr(folded, name) is getattr(layer, name)
    assert torch.equal(folded(x), want)
    assert f"offset_groups={6 if groups else 3}" in repr(folded)

    torch.save(folded.state_dict(), tmp_path / "folded")
    fresh = QLinear(K, N, rank=0).eval()
    fresh.load_state_dict(torch.load(tmp_path / "folded"))
    assert torch.equal(fresh(x), want)
    nn.init.normal_(fresh.add_adapter("next", rank=2, alpha=2).lora_B)
    fresh.set_adapter("next")
    adapter = fresh.adapter("next")
    change = x @ adapter.lora_A.T @ adapter.lora_B.T
    torch.testing.assert_close(fresh(x), want + change, rtol=1e-4, atol=1e-4)

    again = QALoraQLinear(K, N, rank=R)  # and so on: another adapter of group means
    again.share_base(folded)
    again.bias = folded.bias
    nn.init.normal_(again.lora_B)
    y = again.eval()(x)
    torch.testing.assert_close(again.folded()(x), y, rtol=1e-4, atol=1e-4)


def test_what_merging_refuses():
    layer = trained()
    with torch.no_grad():
        layer.lora_B[0, 0] = torch.inf
    for call in (layer.merge, layer.folded):
        with pytest.raises(ValueError, match="merge: expected a finite adapter, got one whose product holds"):
            call()
    assert not layer.merged
    layer = trained()
    layer.merge()
    with pytest.raises(RuntimeError, match="folded: expected an unmerged layer, got a merged one"):
        layer.folded()
    with pytest.raises(RuntimeError, match="folded: expected an unmerged layer, got a merged one"):
        fold(nn.Sequential(layer))
    with pytest.raises(ValueError, match="fold: expected a module that holds layers, got a layer; call its"):
        fold(layer)


def test_what_is_refused():
    for size in (0, 7, 2.0):
        with pytest.raises(ValueError, match=r"expected a group_size that divides in_features 96, got "):
            QALoraQLinear(K, N, group_size=size)
    with pytest.raises(
        ValueError, match=r"set_adapter_values: expected lora_a of shape \(4, 3\), got \(4, 96\)"
    ):
        QALoraQLinear.from_linear(nn.Linear(K, N), rank=R, init="loftq")
    with pytest.raises(TypeError, match="unexpected keyword argument 'group_size'"):
        QLinear.from_linear(nn.Linear(K, N), group_size=32)
