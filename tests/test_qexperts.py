"""fastlora.QExperts by itself: sums and gradients in float64, bits, memory, what torch does to modules."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import QExperts

E, H, INNER, R = 5, 33, 17, 3


def layer(experts=E, hidden=H, inner=INNER, *, rank=R, dtype=torch.float32, **options):
    torch.manual_seed(0)
    made = QExperts(experts, hidden, inner, rank=rank, alpha=4, dtype=dtype, **options)
    for p in made.adapter_parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made


def inputs(tokens=11, top_k=2, dtype=torch.float32, experts=E, hidden=H, seed=1):
    """x, top_k_index, top_k_weights; every token's experts are different ones."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g).to(dtype)
    weights, index = torch.rand(tokens, experts, generator=g).softmax(-1).topk(top_k, dim=-1)
    return x, index, weights


def reference(q, x, index, weights):
    """In float64, every token by dense matrices of its experts; gradients reach q's own parameters."""

    def project(name, x):  # (tokens, top_k, k) to (tokens, top_k, n)
        dense = torch.stack(
            [q.expert(name, e).dequantize(torch.float32) for e in range(q.num_experts)]
        ).double()
        y = torch.einsum("tjnk,tjk->tjn", dense[index], x)
        if q.rank:
            a, b = (p.double() for p in q.adapter(name))
            y = y + q.scaling * torch.einsum("tjnr,tjrk,tjk->tjn", b[index], a[index], x)
        bias = q._parameters[f"{name}_bias"]
        return y if bias is None else y + bias.double()[index]

    y = project(q.up_name, x.double()[:, None].expand(*index.shape, -1))
    if q.gated:
        gate, value = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * value
    else:
        y = torch.nn.functional.silu(y)
    return (project("down_proj", y) * weights.double()[..., None]).sum(1)


def assert_close(got, want, dtype, name=""):
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300)
    assert error <= tolerance, f"{name}: {error:.3g}"


CASES = {
    "plain": {},
    "top_1": {"top_k": 1},
    "top_5_of_5": {"top_k": 5},
    "one_token": {"tokens": 1},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "no_rank": {"rank": 0},
    "ungated_with_bias": {"gated": False, "bias": True},
    "plain_scales": {"double_quant": False, "blocksize": 32},
    "one_expert": {"experts": 1, "top_k": 1},
    "wide": {"hidden": 128, "inner": 192, "tokens": 70},
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient_match_float64(case):
    options = dict(CASES[case])
    of_inputs = {name: options.pop(name) for name in ("tokens", "top_k") if name in options}
    dtype = options.get("dtype", torch.float32)
    q = layer(**options)
    x, index, weights = inputs(dtype=dtype, experts=q.num_experts, hidden=q.hidden_dim, **of_inputs)
    learned = {"x": x.requires_grad_(), "weights": weights.requires_grad_()}
    learned |= {name: p for name, p in q.named_parameters() if p.requires_grad}
    y = q(x, index, weights)
    assert y.dtype == dtype
    want = reference(q, x, index, weights)
    assert_close(y, want, dtype, "y")
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad(y, list(learned.values()), dy.to(dtype))
    wanted = torch.autograd.grad(want, list(learned.values()), dy.to(dtype).double())
    for name, g, w in zip(learned, got, wanted, strict=True):
        assert g.dtype == learned[name].dtype
        assert_close(g, w, dtype, name)


@pytest.mark.parametrize(
    "index",
    [[[2, 2]] * 7, [[0, 4], [4, 0], [0, 4]], [[E, 1], [3, E], [E, E]], []],
    ids=["all_on_one", "some_without_rows", "nobody_s_rows", "no_tokens"],
)
def test_uneven_routings(index):
    q = layer()
    index = torch.tensor(index, dtype=torch.int32).reshape(len(index), 2)
    x = torch.randn(len(index), H, requires_grad=True)
    weights = torch.rand(len(index), 2, requires_grad=True)
    somebody = index < E
    y = q(x, index, weights)
    want = reference(q, x, index.clamp(max=E - 1).long(), weights * somebody)
    learned = [x, weights, *q.adapter_parameters()]
    for g, w in zip(
        (y, *torch.autograd.grad(y.sum(), learned)),
        (want, *torch.autograd.grad(want.sum(), learned)),
        strict=True,
    ):
        assert_close(g, w, torch.float32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_bits_are_those_of_each_expert_by_itself(double_quant, transposed):
    # 61 x 300 weights: the last block is not full, and there is more than one group of scales.
    q = QExperts(
        3, 300, 61, gated=False, transposed=transposed, double_quant=double_quant, rank=0, device="meta"
    )
    dense = torch.randn(3, 61, 300)
    q.set_weight("up_proj", dense.transpose(1, 2) if transposed else dense)
    for e in range(3):
        assert q.expert("up_proj", e) == fastlora.quantize_nf4(dense[e], double_quant=double_quant)
    back = q.dequantize("up_proj")
    assert back.shape == ((3, 300, 61) if transposed else (3, 61, 300))
    want = torch.stack([q.expert("up_proj", e).dequantize() for e in range(3)])
    assert torch.equal(back, want.transpose(1, 2) if transposed else want)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any op made, those that our ops call included."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastlora":  # straight to its kernel, in which the mode is in force again
            with self:
                out = function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)
        else:
            out = function(*args, **(kwargs or {}))
        aliased = {a.untyped_storage().data_ptr() for a in tree_leaves(args) if isinstance(a, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in aliased:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def test_no_dense_weight_is_ever_made():
    q = layer(4, 256, 512, rank=2, dtype=torch.bfloat16)
    x, index, weights = inputs(6, experts=4, hidden=256, dtype=torch.bfloat16)
    one_expert = 512 * 256 * 2  # the smallest dense weight there is, in bytes
    with Largest() as seen:
        q(x.requires_grad_(), index, weights.requires_grad_()).sum().backward()
    assert 0 < seen.bytes < one_expert / 4
    # The yardstick works: the dense weights themselves are seen.
    with Largest() as seen:
        q.dequantize("down_proj")
    assert seen.bytes == 4 * one_expert


def test_quantising_makes_one_dense_expert_at_a_time():
    q = QExperts(8, 256, 256, rank=0, transposed=True, dtype=torch.bfloat16, device="meta")
    dense = torch.randn(8, 256, 256, dtype=torch.bfloat16)
    with Largest() as seen:
        q.quantize("down_proj", dense)
    assert seen.bytes == dense.nbytes / 4  # the codes of all experts


def test_activation_is_the_callers_and_is_checked():
    q = layer(activation=lambda up: torch.tanh(up[:, 1::2]) + up[:, ::2].clamp(max=0.1))
    x, index, weights = inputs()
    assert q(x, index, weights).shape == x.shape
    q.activation = torch.relu
    with pytest.raises(
        ValueError, match=r"^QExperts: expected activation to make \(22, 17\) of \(22, 34\), got \(22, 34\)$"
    ):
        q(x, index, weights)


def test_dropout_in_training_only_and_checkpointing_replays_it():
    q = layer(dropout=0.5)
    x, index, weights = inputs()
    x.requires_grad_()
    learned = [x, *q.adapter_parameters()]

    def gradients(call):
        torch.manual_seed(4)
        y = call()
        return [y, *torch.autograd.grad(y.square().sum(), learned)]

    want = gradients(lambda: q(x, index, weights))
    for reentrant in (False, True):
        if reentrant:
            torch.manual_seed(4)
            y = checkpoint(q, x, index, weights, use_reentrant=True)
            y.square().sum().backward()
            got = [y, *(p.grad for p in learned)]
        else:
            got = gradients(lambda: checkpoint(q, x, index, weights, use_reentrant=False))
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)
    other = q(x, index, weights)
    assert not torch.equal(other, want[0])
    q.eval()
    assert_close(q(x, index, weights), reference(q, x, index, weights), torch.float32)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_to_one_graph(dropout):
    torch._dynamo.reset()
    q = layer(dropout=dropout)
    compiled = torch.compile(q, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (11, 7):
        x, index, weights = inputs(tokens)
        learned = [x.requires_grad_(), weights.requires_grad_(), *q.adapter_parameters()]
        got = torch.autograd.grad(compiled(x, index, weights).square().sum(), learned)
        assert all(bool(g.isfinite().all()) for g in got)
        if not dropout:
            want = torch.autograd.grad(q(x, index, weights).square().sum(), learned)
            for g, w in zip(got, want, strict=True):
                assert_close(g, w, torch.float32)
    torch._dynamo.reset()


def test_another_routing_compiles_nothing_anew():
    torch._dynamo.reset()
    q = layer().eval()
    compiled = torch.compile(q, fullgraph=True, backend="aot_eager")
    x, index, weights = inputs()
    graphs = torch._dynamo.utils.counters["stats"]
    others = (torch.zeros_like(index), index.flip(1), torch.full_like(index, E))
    with torch.inference_mode():
        compiled(x, index, weights)
        before = graphs["unique_graphs"]
        for other in others:
            assert torch.equal(compiled(x, other, weights), q(x, other, weights))
    assert graphs["unique_graphs"] == before
    torch._dynamo.reset()


def test_autocast_computes_in_its_dtype_and_returns_the_inputs():
    q = layer(hidden=64, inner=48)
    x, index, weights = inputs(hidden=64)
    with torch.autocast("cpu", torch.bfloat16):
        y = q(x, index, weights)
    assert y.dtype == torch.float32
    assert_close(y, reference(q, x, index, weights), torch.bfloat16)
    assert not torch.equal(y, q(x, index, weights))


def test_results_are_the_same_bits_on_every_run():
    q = layer(dtype=torch.bfloat16)
    x, index, weights = inputs(dtype=torch.bfloat16)

    def run():
        learned = [x.requires_grad_(), weights.requires_grad_(), *q.adapter_parameters()]
        y = q(x, index, weights)
        return [y, *torch.autograd.grad(y.sum(), learned)]

    for g, w in zip(run(), run(), strict=True):
        assert torch.equal(g, w)


# --- what torch does to modules ---------------------------------------------------------------------------


def test_copies_pickles_and_state_dicts_keep_the_bits():
    q = layer(bias=True)
    x, index, weights = inputs()
    want = q(x, index, weights)
    other = QExperts(E, H, INNER, bias=True, rank=R, alpha=4, dtype=torch.float32)
    other.load_state_dict(q.state_dict())
    meta = QExperts(E, H, INNER, bias=True, rank=R, alpha=4, dtype=torch.float32, device="meta")
    meta.load_state_dict(q.state_dict(), assign=True)
    saved = io.BytesIO()
    torch.save(q, saved)
    saved.seek(0)
    for one in (
        other, meta, copy.deepcopy(q), pickle.loads(pickle.dumps(q)), torch.load(saved, weights_only=False)
    ):  # fmt: skip
        assert torch.equal(one(x, index, weights), want)


def test_parameters_have_the_expert_first_and_casts_leave_the_codes():
    q = layer(bias=True)
    want = {name: p.clone() for name, p in q.named_parameters() if p.dtype == torch.uint8}
    assert sorted(want) == [
        f"{p}{s}" for p in ("down_proj", "gate_up_proj") for s in ("", "_nested", "_scales")
    ]
    assert {p.shape[0] for p in q.parameters()} == {E}
    assert not any(p.requires_grad for name, p in q.named_parameters() if name in want)
    q.to(torch.bfloat16)
    assert q.down_proj_lora_A.dtype == q.down_proj_bias.dtype == torch.bfloat16
    for name, bits in want.items():
        assert torch.equal(q.get_parameter(name), bits)


def test_reset_gives_back_the_base():
    q = layer()
    x, index, weights = inputs()
    base = copy.deepcopy(q)
    base.rank = 0
    for name in ("gate_up_proj", "down_proj"):
        setattr(base, f"{name}_lora_A", None)
        setattr(base, f"{name}_lora_B", None)
    assert not torch.equal(q(x, index, weights), base(x, index, weights))
    q.reset_adapter()
    assert torch.equal(q(x, index, weights), base(x, index, weights))
    before = q.down_proj
    q.reset_parameters()
    assert q.down_proj is before
    assert not torch.equal(q.down_proj, base.down_proj)


def test_rslora_and_the_printed_form():
    q = QExperts(2, 64, 64, rank=4, alpha=8, use_rslora=True)
    assert q.scaling == 4
    text = str(q)
    for part in ("num_experts=2", "rank=4", "alpha=8", "use_rslora=True", "bits/weight", "SwiGLU"):
        assert part in text
    assert "rank=0, blocksize" in repr(QExperts(2, 64, 64, rank=0, device="meta"))


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"x": torch.zeros(3, 4, H)}, ValueError,
         r"expected hidden_states of shape \(tokens, 33\), got \(3, 4, 33\)"),
        ({"x": torch.zeros(11, H + 1)}, ValueError,
         r"expected hidden_states of shape \(tokens, 33\), got \(11, 34\)"),
        ({"index": torch.zeros(3, 2, dtype=torch.int64)}, ValueError,
         r"expected top_k_index of shape \(11, top_k\), got \(3, 2\)"),
        ({"index": torch.zeros(11, dtype=torch.int64)}, ValueError,
         r"expected top_k_index of shape \(11, top_k\), got \(11,\)"),
        ({"index": torch.zeros(11, 2)}, TypeError,
         "expected top_k_index in int32 or int64, got torch.float32"),
        ({"weights": torch.zeros(11, 3)}, ValueError,
         r"expected top_k_weights of shape \(11, 2\) as top_k_index, got \(11, 3\)"),
    ],
)  # fmt: skip
def test_bad_inputs(changes, kind, message):
    names = dict(zip(("x", "index", "weights"), inputs(), strict=True)) | changes
    with pytest.raises(kind, match=f"^QExperts: {message}$"):
        layer()(*names.values())


def test_an_expert_that_is_not_there():
    x, index, weights = inputs()
    index[3, 1] = E + 1
    with pytest.raises(ValueError, match=r"expected slots in -1 \.\. 4, got 6 at position 7 of 22"):
        layer()(x, index, weights)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_experts": 0}, ValueError, "QExperts: expected num_experts >= 1, got 0"),
        ({"hidden_dim": 2.0}, TypeError, "QExperts: expected hidden_dim as an int, got 2.0"),
        ({"intermediate_dim": True}, TypeError, "QExperts: expected intermediate_dim as an int, got True"),
        ({"rank": -1}, ValueError, "QLinear: expected rank >= 0, got -1"),
        ({"dropout": 1.0}, ValueError, r"QLinear: expected dropout in \[0, 1\), got 1.0"),
        ({"blocksize": 48}, ValueError, r"QLinear: expected blocksize in \(32, .*\), got 48"),
        ({"dtype": torch.int8}, TypeError,
         "QLinear: expected dtype float32, bfloat16 or float16, got torch.int8"),
    ],
)  # fmt: skip
def test_bad_arguments(options, kind, message):
    with pytest.raises(kind, match=f"^{message}$"):
        QExperts(**({"num_experts": 2, "hidden_dim": 4, "intermediate_dim": 4} | options))


def test_bad_weights_are_named_and_change_nothing():
    q = layer()
    before = q.down_proj.clone()
    dense = torch.zeros(E, H, INNER)
    with pytest.raises(
        ValueError, match=r"^QExperts.quantize: expected down_proj of shape \(5, 33, 17\), got \(5, 17, 33\)$"
    ):
        q.set_weight("down_proj", dense.transpose(1, 2))
    dense[3, 2, 1] = torch.inf
    with pytest.raises(ValueError, match=r"the first at index \(2, 1\), of down_proj's expert 3$"):
        q.set_weight("down_proj", dense)
    with pytest.raises(
        TypeError, match=r"expected weight in float32, bfloat16 or float16, got torch\.float64"
    ):
        q.set_weight("down_proj", dense.double())
    assert torch.equal(q.down_proj, before)
    for method, args in (
        ("quantize", (dense,)),
        ("dequantize", ()),
        ("dense_shape", ()),
        ("expert", (0,)),
        ("adapter", ()),
    ):
        with pytest.raises(ValueError, match=rf"^QExperts.{method}: expected one of .*, got 'up_proj'$"):
            getattr(q, method)("up_proj", *args)
    with pytest.raises(ValueError, match=r"^QExperts.expert: expected an expert in 0 \.\. 4, got -1$"):
        q.expert("down_proj", -1)
    with pytest.raises(ValueError, match=r"^QExperts.adapter: expected a rank above 0, got 0$"):
        layer(rank=0).adapter("down_proj")


def test_a_dense_state_dict_is_refused():
    q = layer(rank=0)
    state = q.state_dict() | {"down_proj": torch.zeros(E, H, INNER)}
    with pytest.raises(
        RuntimeError, match=r"QExperts: expected down_proj in uint8 \(packed NF4\), got torch.float32"
    ):
        q.load_state_dict(state)


def test_parametrised_codes_are_refused():
    q = layer(rank=0)
    torch.nn.utils.parametrize.register_parametrization(q, "down_proj", torch.nn.Identity(), unsafe=True)
    with pytest.raises(RuntimeError, match=r"^QExperts: expected plain parameters, got parametrised ones"):
        q(*inputs())
