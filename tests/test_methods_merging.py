"""Adapters merged with each other and with weights."""

import copy
from dataclasses import replace

import pytest
import torch
from tolerances import relative_error
from torch import nn

import fastlora
from fastlora import QLinear
from fastlora.methods.dora import DoraQLinear
from fastlora.methods.merging import (
    add_merged_adapter,
    make_dense,
    merge_into_nf4,
    merge_pairs,
    to_linear,
)

N, K = 40, 72


def pair(r, seed, scaling=1.0):
    torch.manual_seed(seed)
    return torch.randn(r, K), torch.randn(N, r), scaling


def change(pairs, weights):
    return sum(w * s * b.double() @ a.double() for (a, b, s), w in zip(pairs, weights, strict=True))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def converted(ranks=(4, 4)):
    """With adapters "one" on both layers and "two" on the first."""
    net = Net()
    fastlora.convert(net, rank=0, progress=False)
    for seed, (name, rank, layers) in enumerate((("one", ranks[0], "up down"), ("two", ranks[1], "up"))):
        torch.manual_seed(10 + seed)
        for at in layers.split():
            adapter = net.get_submodule(at).add_adapter(name, rank, 6)
            nn.init.normal_(adapter.lora_B, std=0.1)
    return net


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
def test_the_sum_of_the_changes(weights):
    pairs = [pair(3, 0, 2.0), pair(5, 1, 0.5)]
    want = change(pairs, weights)
    a, b = merge_pairs(pairs, weights, "cat")
    assert a.shape == (8, K)
    assert relative_error(b @ a, want) < 1e-6
    for rank in (1, 5, 8, 11):
        a, b = merge_pairs(pairs, weights, "svd", rank)
        assert (a.shape, b.shape) == ((rank, K), (N, rank))
        u, s, vh = torch.linalg.svd(want)
        assert relative_error(b @ a, (u[:, :rank] * s[:rank]) @ vh[:rank]) < 1e-5
    assert merge_pairs(pairs, weights)[0].shape == (5, K)


def test_svd_of_more_ranks_than_columns():
    pairs = [pair(60, 0), pair(50, 1)]
    a, b = merge_pairs(pairs, (1, 1), "svd", 100)
    assert relative_error(b @ a, change(pairs, (1, 1))) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.5, -0.3)])
def test_pefts_numbers(kind, weights):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    net = converted()
    dense = Net()
    for name in ("up", "down"):
        dense.get_submodule(name).weight.data = net.get_submodule(name).dequantize()
    model = peft.get_peft_model(
        dense, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["up", "down"]), "one"
    )
    model.add_adapter("two", peft.LoraConfig(r=4, lora_alpha=6, target_modules=["up"]))
    theirs = model.base_model.model
    for name, layers in (("one", "up down"), ("two", "up")):
        for at in layers.split():
            theirs.get_submodule(at).lora_A[name].weight.data.copy_(
                net.get_submodule(at).adapters[name].lora_A
            )
            theirs.get_submodule(at).lora_B[name].weight.data.copy_(
                net.get_submodule(at).adapters[name].lora_B
            )
    model.add_weighted_adapter(["one", "two"], list(weights), "both", combination_type=kind)
    model.set_adapter("both")
    add_merged_adapter(net, "both", ["one", "two"], weights, kind=kind)
    for at in ("up", "down"):
        layer = net.get_submodule(at)
        layer.set_adapter("both")
        of = layer.adapter("both")
        assert of.scaling == 1
        want = theirs.get_submodule(at).get_delta_weight("both")
        torch.testing.assert_close(of.lora_B @ of.lora_A, want, rtol=1e-4, atol=1e-5)
        if kind == "linear":
            torch.testing.assert_close(
                of.lora_A.detach(), theirs.get_submodule(at).lora_A["both"].weight.detach()
            )
    x = torch.randn(5, K)
    torch.testing.assert_close(net(x), model(x), rtol=1e-3, atol=1e-4)


def test_a_merged_adapter_is_one_like_others(tmp_path):
    net = converted((3, 5))
    add_merged_adapter(net, "both", ["one", "two"], [1, 1], kind="cat")
    assert net.up.adapter("both").rank == 8
    assert net.down.adapter("both").rank == 3
    assert not net.up.adapters["both"].lora_A.requires_grad
    fastlora.save_adapter(net, tmp_path, name="both")
    other = converted((3, 5))
    fastlora.load_adapter(other, tmp_path, name="again")
    x = torch.randn(2, K)
    with fastlora.adapters(net, ["both", None]), fastlora.adapters(other, ["again", None]):
        torch.testing.assert_close(net(x), other(x))


def test_what_pissa_learnt_as_an_adapter_of_the_weight():
    dense = nn.Linear(K, N)
    layer = QLinear.from_linear(dense, rank=4, init="pissa")
    start = layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), layer.scaling
    with torch.no_grad():
        layer.lora_A += 0.1
    now = layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling
    a, b = merge_pairs([now, start], [1, -1], "cat")
    want = layer.merged_weight() - layer.dequantize() - start[2] * start[1] @ start[0]
    torch.testing.assert_close(b @ a, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_linear(dtype):
    torch.manual_seed(0)
    for kind in (QLinear, DoraQLinear):
        layer = kind(K, N, rank=4).eval()
        nn.init.normal_(layer.lora_B, std=0.1)
        dense = to_linear(layer, dtype)
        assert type(dense) is nn.Linear
        assert torch.equal(dense.weight, layer.merged_weight().to(dtype))
        x = torch.randn(3, K)
        assert relative_error(dense(x.to(dtype)), layer(x).detach().double()) < (
            1e-5 if dtype == torch.float32 else 1e-2
        )
        assert dense.bias.data_ptr() != layer.bias.data_ptr()
        layer.merge()
        torch.testing.assert_close(to_linear(layer, torch.float32).weight.detach(), layer.dequantize())


def test_make_dense():
    net = converted()
    for layer in (net.up, net.down):
        layer.set_adapter("one")
    net.alias = net.up
    x = torch.randn(3, K)
    want = net(x)
    assert make_dense(net, torch.float32) == 2
    assert type(net.up) is nn.Linear
    assert net.alias is net.up
    torch.testing.assert_close(net(x), want.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="make_dense: expected a module that holds layers, got a layer"):
        make_dense(QLinear(8, 8))


def test_merging_into_nf4_says_what_it_cost():
    net = converted()
    net.up.set_adapter("one")
    net.down.set_adapter(None)
    want = net.up.merged_weight()
    before = net.up.dequantize()
    (rounding,) = merge_into_nf4(net)
    off = (net.up.dequantize() - want).norm()
    assert rounding.name == "up"
    assert rounding.of_weight == pytest.approx((off / want.norm()).item(), rel=1e-5)
    assert rounding.of_change == pytest.approx((off / (want - before).norm()).item(), rel=1e-5)
    assert 0.05 < rounding.of_weight < 0.15
    with pytest.raises(
        RuntimeError, match="expected unmerged layers whose parameters are whole, got 1 that are not: up"
    ):
        merge_into_nf4(net)
    net.up.unmerge()
    assert torch.equal(net.up.dequantize(), before)
    assert replace(net.up.merge(), name="up") == rounding
    assert net.up.merge() is None  # it is merged
    assert net.down.merge() is None  # no adapter is active


def test_pefts_layers_are_merged_into_nf4_and_made_dense():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    net = Net()
    fastlora.convert(net, rank=0, progress=False)
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
    model = peft.get_peft_model(net, peft.LoraConfig(**options, target_modules=["up", "down"]))
    model.add_adapter("two", peft.LoraConfig(**options, target_modules=["up"], lora_bias=True))
    model.base_model.set_adapter(["default", "two"])
    with torch.no_grad():
        model.base_model.model.up.lora_B["two"].bias.normal_()
    x = torch.randn(3, K)
    want = model.eval()(x).detach()
    up = model.base_model.model.up
    base = up.qlinear.dequantize()
    wanted = base + up.get_delta_weight("default") + up.get_delta_weight("two")
    costs = merge_into_nf4(model)
    assert [cost.name for cost in costs] == ["base_model.model.up", "base_model.model.down"]
    off = up.qlinear.dequantize() - wanted
    assert costs[0].of_weight == pytest.approx((off.norm() / wanted.norm()).item(), rel=1e-4)
    assert costs[0].of_change == pytest.approx((off.norm() / (wanted - base).norm()).item(), rel=1e-4)
    with pytest.raises(RuntimeError, match=r"got 2 that are not: base_model\.model\.up"):
        merge_into_nf4(model)
    in_force = model(x).detach()
    merged = copy.deepcopy(model)
    assert make_dense(merged, torch.float32) == 2
    torch.testing.assert_close(merged(x), in_force, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="expected a module that holds layers, got a layer; use to_linear"):
        make_dense(up)
    assert make_dense(model, torch.float32) == 2
    dense = model.unload()
    assert type(dense.up) is type(dense.down) is nn.Linear
    torch.testing.assert_close(dense(x), want, rtol=1e-4, atol=1e-5)


def test_what_is_refused():
    two = [pair(3, 0), pair(5, 1)]
    for arguments, message in (
        ((two, [1, 1], "ties"), "expected kind 'svd', 'linear' or 'cat', got 'ties'"),
        ((two, [1]), "expected a weight for each of one or more adapters, got 1 for 2"),
        (([], []), "got 0 for 0"),
        ((two, [1, 1], "linear"), r"expected adapters of one rank for 'linear', got ranks \[3, 5\]"),
        ((two, [1, 1], "cat", 4), "expected a rank >= 1, with kind 'svd' only, got 4 with 'cat'"),
        ((two, [1, 1], "svd", 0), "expected a rank >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_pairs(*arguments)
    net = converted((3, 5))
    for arguments, message in (
        (
            ("x", ["one", "three"], [1, 1]),
            r"expected names of adapters, got \['three'\]; .* \['one', 'two'\]",
        ),
        (("x", [], []), "expected names of adapters"),
        (("two", ["one"], [1]), "expected a new name without a dot, got 'two'"),
        (("default", ["one"], [1]), "expected a new name without a dot"),
        (("x", ["one", "two"], [1]), "expected 2 weights, one an adapter, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            add_merged_adapter(net, *arguments)
    with pytest.raises(ValueError, match="of one rank for 'linear'"):
        add_merged_adapter(net, "x", ["one", "two"], [1, 1], kind="linear")
    net.up.set_adapter("one")
    net.up.merge()
    with pytest.raises(
        RuntimeError, match="expected unmerged, unsharded layers of plain LoRA, got QLinear, merged"
    ):
        add_merged_adapter(net, "x", ["one"], [1])
    assert net.down.adapter_names == ("one",)
    with pytest.raises(RuntimeError, match="of plain LoRA, got DoraQLinear"):
        add_merged_adapter(nn.Sequential(DoraQLinear(8, 8)), "x", ["default"], [1])
