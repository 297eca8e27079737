"""Weights with offsets wherever a package goes with them: copies, casts, states, adapters by name, graphs."""

import copy
import pickle

import pytest
import torch
from tolerances import TOLERANCES, relative_error
from torch import nn

import fastlora
from fastlora import NF4Weight, QLinear, quantize_nf4
from fastlora.methods import merging
from fastlora.methods.dora import DoraQLinear

K, N, R = 96, 40, 4
BASE = ("weight", "weight_scales", "weight_nested", "weight_offsets")


def values(groups, n=N):
    return 0.1 * torch.randn(n, groups, generator=torch.Generator().manual_seed(groups))


def layer(groups=3, kind=QLinear, **options):
    torch.manual_seed(0)
    made = kind(K, N, **{"rank": R, "alpha": 8} | options)
    made._set_base(made.quantized_weight.with_offsets(values(groups)))
    if made.lora_B is not None:
        nn.init.normal_(made.lora_B, std=0.1)
    return made


def bits(of):
    return [getattr(of, name) for name in BASE]


def same_bits(a, b):
    return all(torch.equal(p, q) for p, q in zip(bits(a), bits(b), strict=True))


# --- the format -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(N, K), (4, 10, K), (K,)], ids=str)
def test_quantising_about_offsets(shape):
    torch.manual_seed(0)
    rows = torch.Size(shape[:-1]).numel()
    mean = values(3, rows)
    dense = torch.randn(shape) * 0.02 + mean.repeat_interleave(K // 3, 1).reshape(shape)
    weight = quantize_nf4(dense, offsets=mean)
    assert torch.equal(weight.offset_values, mean)
    bare = weight.with_offsets(None)
    assert bare == quantize_nf4((dense.reshape(rows, 3, -1) - mean[:, :, None]).reshape(shape))
    want = bare.dequantize() + mean.repeat_interleave(K // 3, 1).reshape(shape)
    assert torch.equal(weight.dequantize(), want)
    assert torch.equal(weight.dequantize(torch.bfloat16), want.bfloat16())
    assert relative_error(want, dense) < 0.8 * relative_error(quantize_nf4(dense).dequantize(), dense)
    assert weight != bare
    assert weight != weight.with_offsets(2 * mean)
    assert weight == weight.with_offsets(mean) == weight.to("cpu")
    assert weight.nbytes == bare.nbytes + 4 * mean.numel()
    assert weight.bits_per_weight == pytest.approx(bare.bits_per_weight + 32 * 3 / K)


def test_offsets_off_a_boundary_of_4():
    """As a slice of a file's bytes may lie."""
    weight = quantize_nf4(torch.randn(N, K), offsets=values(3))
    room = torch.empty(weight.offsets.numel() + 1, dtype=torch.uint8)
    room[1:] = weight.offsets.flatten()
    other = NF4Weight(
        weight.packed, weight.scales, weight.nested, weight.shape, weight.dtype, 64, room[1:].view(N, -1)
    )
    assert torch.equal(other.offset_values, weight.offset_values)
    assert torch.equal(other.dequantize(), weight.dequantize())
    x = torch.randn(3, K)
    assert torch.equal(fastlora.nf4_linear(x, other), fastlora.nf4_linear(x, weight))


def test_what_the_format_refuses():
    dense = torch.randn(N, K)
    for wrong in (torch.zeros(N, 5), torch.zeros(N + 1, 3), torch.zeros(N), torch.zeros(N, 0)):
        with pytest.raises(
            ValueError, match=r"quantize_nf4: expected offsets of shape \(40, groups\), groups a"
        ):
            quantize_nf4(dense, offsets=wrong)
    with pytest.raises(
        TypeError, match="quantize_nf4: expected offsets in float32, bfloat16 or float16, got"
    ):
        quantize_nf4(dense, offsets=torch.zeros(N, 3, dtype=torch.int32))
    weight = quantize_nf4(dense)
    with pytest.raises(
        ValueError, match=r"NF4Weight: expected offsets of shape \(40, 4 \* groups\), groups a "
    ):
        weight.with_offsets(torch.zeros(N, 7))
    with pytest.raises(ValueError, match="to_bitsandbytes: expected a weight without offsets"):
        weight.with_offsets(values(3)).to_bitsandbytes()


# --- a layer ----------------------------------------------------------------------------------------------


def test_copies_and_casts_leave_the_bits():
    original = layer()
    x = torch.randn(3, K)
    y = original(x)
    for other in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert same_bits(other, original)
        assert torch.equal(other(x), y)
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()):
        assert same_bits(cast(copy.deepcopy(original)), original)
    assert fastlora.use_huge_pages(original) >= 0
    assert torch.equal(original(x), y)
    assert "offset_groups=3" in repr(original)
    assert f"{original.quantized_weight.bits_per_weight:.3f} bits/weight" in repr(original)


@pytest.mark.parametrize(("device", "assign"), [("cpu", False), ("cpu", True), ("meta", True)])
def test_states(device, assign):
    original = layer()
    state = original.state_dict()
    fresh = QLinear(K, N, rank=R, alpha=8, device=device)
    fresh.load_state_dict(state, assign=assign)
    assert same_bits(fresh, original)
    assert not fresh.weight_offsets.requires_grad
    x = torch.randn(3, K)
    assert torch.equal(fresh(x), original(x))


def test_states_that_do_not_fit():
    original, plain = layer(), QLinear(K, N, rank=R)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"weight_offsets\""):
        original.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight_offsets"):
        layer(2).load_state_dict(original.state_dict())
    state = original.state_dict()
    state["weight_offsets"] = state["weight_offsets"][:, :7].contiguous()
    with pytest.raises(
        RuntimeError, match=r"QLinear: expected weight_offsets of shape \(40, 4 \* groups\), gr"
    ):
        plain.load_state_dict(state)
    state["weight_offsets"] = torch.zeros(N, 12)
    with pytest.raises(RuntimeError, match="QLinear: expected weight_offsets in uint8"):
        plain.load_state_dict(state)
    assert plain.weight_offsets is None


def test_sharing_a_base():
    original = layer()
    for other in (QLinear(K, N, rank=2), layer(2)):
        other.share_base(original)
        assert all(p is q for p, q in zip(bits(other), bits(original), strict=True))
    original.share_base(QLinear(K, N, rank=0))
    assert original.weight_offsets is None


def test_drawing_a_weight_anew_forgets_the_offsets():
    original = layer()
    original.reset_parameters()
    assert not original.weight_offsets.any()
    assert torch.equal(original.dequantize(), original.quantized_weight.with_offsets(None).dequantize())


@pytest.mark.parametrize("kind", [QLinear, DoraQLinear])
def test_merging_keeps_them(kind):
    original = layer(kind=kind).eval()
    exact, before = original.merged_weight(), bits(original)
    x = torch.randn(3, K)
    dense = merging.to_linear(original, torch.float32)
    torch.testing.assert_close(dense(x), original(x), rtol=1e-4, atol=1e-4)
    original.merge()
    assert torch.equal(original.weight_offsets, before[3])
    assert original.quantized_weight == quantize_nf4(exact, offsets=values(3))
    torch.testing.assert_close(original(x), x @ original.dequantize().T + original.bias, rtol=1e-4, atol=1e-4)
    original.unmerge()
    assert all(was is now for was, now in zip(before, bits(original), strict=True))


def test_converting_around_them():
    """They count as bytes and not as weights, in the report and in what trains."""
    net = nn.Sequential(layer(rank=0), nn.Linear(N, N))
    report = fastlora.convert(net, rank=R, progress=False)
    assert report.total == N * K + N + N * N + N + 2 * N * R
    assert report.trainable == 2 * N * R
    assert net[0].quantized_weight.offsets is not None


# --- adapters by name -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 40])
def test_a_batch_of_several_adapters(dtype, rows):
    one = layer()
    nn.init.normal_(one.add_adapter("a", rank=3, alpha=6).lora_B, std=0.1)
    names = [("default", "a", None)[i % 3] for i in range(rows)]
    x = torch.randn(rows, K, dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, N, dtype=dtype)
    with fastlora.adapters(one, names):
        y = one(x)
        y.backward(dy)
    w = one.dequantize(torch.float32).double()
    xd = x.detach().double().requires_grad_()
    pairs = {n: [t.detach().double().requires_grad_() for t in one.adapter(n)[:2]] for n in ("default", "a")}
    want = []
    for row, name in zip(xd, names, strict=True):
        out = w @ row + one.bias.detach().double()
        if name is not None:
            a, b = pairs[name]
            out = out + one.adapter(name).scaling * b @ (a @ row)
        want.append(out)
    want = torch.stack(want)
    want.backward(dy.double())
    tolerance = 2 * TOLERANCES[dtype].frobenius
    assert relative_error(y, want.detach()) < tolerance
    assert relative_error(x.grad, xd.grad) < tolerance
    for name, (a, b) in pairs.items():
        assert relative_error(one.adapter(name).lora_A.grad, a.grad) < tolerance
        assert relative_error(one.adapter(name).lora_B.grad, b.grad) < tolerance
    for name in ("a", None):
        one.set_adapter(name)
        want = xd.detach() @ w.T + one.bias.detach().double()
        if name:
            a, b = pairs[name]
            want += one.adapter(name).scaling * (xd @ a.T @ b.T).detach()
        assert relative_error(one(x), want) < tolerance


def test_compiled():
    torch._dynamo.reset()
    one = layer()
    compiled = torch.compile(one, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (3, 5):
        x = torch.randn(m, K, requires_grad=True)
        wanted = (x, one.lora_A, one.lora_B)
        assert torch.equal(compiled(x), one(x))
        got = torch.autograd.grad(compiled(x).square().sum(), wanted)
        want = torch.autograd.grad(one(x).square().sum(), wanted)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_training_over_them_lowers_a_loss():
    one = layer()
    x, target = torch.randn(64, K), torch.randn(64, N)
    optimizer = torch.optim.AdamW(one.adapter_parameters(), lr=1e-2)
    before = bits(one)
    held = [p.clone() for p in before]
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(one(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, q) for p, q in zip(held, bits(one), strict=True))
