"""The ops of stacked experts against the reference, expert by expert; on the CPU and on devices."""

import pytest
import torch
from experts_contract import EXPERTS_ARGS, make_stack
from linear_cases import FLOATS
from tolerances import TOLERANCES, relative_error

from fastlora import reference
from fastlora.autograd import _SEED_BOUND
from fastlora.experts_autograd import experts_linear

ops = torch.ops.fastlora
E, N, K, R, S = 4, 33, 71, 5, 0.5
# Of experts 0..3, -1 is nobody: some, one for all, none at all, no rows.
ROUTINGS = {
    "some": [3, 0, -1, 3, 3, 0, 2, 3, 2, 0, 3],
    "one": [1] * 9,
    "nobody": [-1, -1],
    "empty": [],
}


def case(slots, dtype, rank=R, double_quant=True, bias=True, seed=3):
    """Rows by expert, their experts, segments, and the other arguments of the ops."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=g) * scale

    slots = torch.tensor(slots, dtype=torch.int32)
    order, segments = reference.lora_route(slots, E)
    weight = make_stack(E, N, K, double_quant=double_quant)
    return {
        "x": normal(len(slots), K).to(dtype),
        "dy": normal(len(slots), N).to(dtype),
        "of": slots[order].tolist(),
        "segments": segments,
        "weight": weight,
        "bias": normal(E, N).to(dtype) if bias else None,
        "lora_a": normal(E, rank, K, scale=K**-0.5) if rank else None,
        "lora_b": normal(E, N, rank, scale=0.2) if rank else None,
    }


def reference_of(c, mask=None):
    """y, u, dx, v, dA, dB, dbias in float64. mask: what dropout makes of ones like x."""
    seen = c["x"].double() if mask is None else c["x"].double() * mask
    rank = 0 if c["lora_a"] is None else R
    m = len(c["of"])
    y, dx = torch.zeros(m, N).double(), torch.zeros(m, K).double()
    u, v = torch.zeros(m, rank).double(), torch.zeros(m, rank).double()
    da, db, dbias = (torch.zeros(E, *shape).double() for shape in ((rank, K), (N, rank), (N,)))
    for i, e in enumerate(c["of"]):
        if e < 0:
            continue
        w = c["weight"].dense[e]
        dy = c["dy"][i].double()
        y[i], _ = reference.nf4_linear(c["x"][i], w, None if c["bias"] is None else c["bias"][e])
        dx[i], _ = reference.nf4_linear_grad_input(dy, w)
        dbias[e] += dy
        if rank:
            a, b = c["lora_a"][e].double(), c["lora_b"][e].double()
            u[i], v[i] = a @ seen[i], S * dy @ b
            y[i] += S * b @ u[i]
            dx[i] += (v[i] @ a) * (1 if mask is None else mask[i])
            da[e] += torch.outer(v[i], seen[i])
            db[e] += S * torch.outer(dy, u[i])
    return y, u, dx, v, da, db, dbias


def results_of(c, seed=None, dropout=0.0):
    w = c["weight"]
    lora = (c["lora_a"], c["lora_b"], S, seed, dropout)
    y, u = ops.nf4_experts_linear(c["x"], c["segments"], *w.tensors, 64, c["bias"], *lora)
    dx, v = ops.nf4_experts_grad_input(c["dy"], c["segments"], *w.tensors, K, 64, *lora)
    dbias = ops.nf4_experts_grad_bias(c["dy"], c["segments"], E)
    if c["lora_a"] is None:
        return y, u, dx, v, torch.zeros(E, 0, K), torch.zeros(E, N, 0), dbias
    da, db = ops.lora_experts_grads(c["dy"], c["x"], u, v, c["segments"], *lora)
    return y, u, dx, v, da, db, dbias


def check(got, want, dtype):
    for name, g, w in zip(("y", "u", "dx", "v", "dA", "dB", "dbias"), got, want, strict=True):
        assert g.shape == w.shape, name
        if w.norm() == 0:
            assert not g.any(), name
        else:
            assert relative_error(g, w) <= 3 * TOLERANCES[dtype].frobenius, name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", ROUTINGS)
def test_all_results_are_the_references(rows, dtype, layer_device):
    c = case(ROUTINGS[rows], dtype)
    check(results_of(c), reference_of(c), dtype)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_a_base_alone_with_either_kind_of_scales(double_quant, layer_device):
    c = case(ROUTINGS["some"], torch.float32, rank=0, double_quant=double_quant, bias=False)
    check(results_of(c), reference_of(c), torch.float32)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dropout_is_the_masks_of_the_reference(dtype, op_device):
    c = case(ROUTINGS["some"], dtype)
    seed = torch.tensor([12345])
    mask = reference.lora_dropout(torch.ones_like(c["x"]), 12345, 0.25)
    check(results_of(c, seed, 0.25), reference_of(c, mask), dtype)


def test_an_experts_rows_get_the_bits_of_the_layers_kernel():
    c = case(ROUTINGS["some"], torch.bfloat16)
    w, got = c["weight"], results_of(c)[0]
    for e in range(E):
        rows = [i for i, other in enumerate(c["of"]) if other == e]
        lora = (c["lora_a"][e], c["lora_b"][e], S)
        want = ops.nf4_linear(c["x"][rows], *(t[e] for t in w.tensors), 64, c["bias"][e], *lora)
        assert torch.equal(got[rows], want)


def test_experts_without_rows_are_not_read():
    c = case(ROUTINGS["one"], torch.float32, double_quant=False)
    want = results_of(c)
    w = make_stack(E, N, K, double_quant=False)
    scales = w.scales.clone()
    for e in (0, 2, 3):
        scales[e] = 0xFF  # NaN
        for name in ("bias", "lora_a", "lora_b"):
            c[name][e] = torch.nan
    c["weight"] = type(w)(w.packed, scales, None, 64, w.dense)
    for g, other in zip(results_of(c), want, strict=True):
        assert torch.equal(g, other)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_autograd_gives_what_the_ops_do(dropout):
    c = case(ROUTINGS["some"], torch.float32)
    learned = [c[name].requires_grad_() for name in ("x", "bias", "lora_a", "lora_b")]
    torch.manual_seed(8)
    y = experts_linear(c["x"], c["segments"], (*c["weight"].tensors, 64), *(learned[1:]), S, dropout)
    got = torch.autograd.grad(y, learned, c["dy"])
    torch.manual_seed(8)
    seed = torch.randint(_SEED_BOUND, (1,)) if dropout else None
    with torch.no_grad():
        want_y, _, dx, _, da, db, dbias = results_of(c, seed, dropout)
    assert torch.equal(y, want_y)
    for g, w in zip(got, (dx, dbias, da, db), strict=True):
        assert torch.equal(g, w)


def test_gradients_only_of_what_learns():
    c = case(ROUTINGS["some"], torch.float32)
    args = (c["segments"], (*c["weight"].tensors, 64), c["bias"])
    a = c["lora_a"].requires_grad_()
    (da,) = torch.autograd.grad(experts_linear(c["x"], *args, a, c["lora_b"], S), [a], c["dy"])
    assert torch.equal(da, results_of(c)[4])
    assert not experts_linear(c["x"], *args, a.detach(), c["lora_b"], S).requires_grad


def test_a_second_derivative_is_refused_when_it_is_taken():
    c = case(ROUTINGS["some"], torch.float32)
    x = c["x"].requires_grad_()
    y = experts_linear(x, c["segments"], (*c["weight"].tensors, 64), None, c["lora_a"], c["lora_b"], S)
    (dx,) = torch.autograd.grad(y, x, c["dy"].requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="expected one differentiation, got a second one"):
        dx.sum().backward()


def test_opcheck_without_the_optional_parts_and_with_dropout():
    args = EXPERTS_ARGS["nf4_experts_linear"]()
    bare = args | {"bias": None, "lora_a": None, "lora_b": None}
    torch.library.opcheck(ops.nf4_experts_linear.default, tuple(bare.values()))
    dropped = args | {"seed": torch.tensor([3]), "dropout": 0.5}
    torch.library.opcheck(ops.nf4_experts_linear.default, tuple(dropped.values()))
