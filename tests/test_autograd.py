"""fastlora.nf4_linear: its gradients against the reference, and every way torch runs a function; on the CPU,
and on devices, where the same calls take other kernels."""

import pytest
import torch
from tolerances import TOLERANCES, relative_error
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import reference

# Relative Frobenius error by x's dtype: a gradient passes through one rounding more than an output does.
TOLERANCE = {dtype: 2 * t.frobenius for dtype, t in TOLERANCES.items()}
N, K, R, SCALING = 40, 72, 7, 0.5
# float32, whose products are torch's on a device, and a dtype that has kernels there.
in_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make_weight(n, k):
    return fastlora.quantize_nf4(torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.1)


@pytest.fixture(scope="module")
def weight():
    return make_weight(N, K)


def inputs(dtype=torch.float32, adapter_dtype=None, lead=(2, 3), grad=True, n=N, k=K):
    """x, lora_a, lora_b, bias."""
    g = torch.Generator().manual_seed(2)
    adapter_dtype = adapter_dtype or dtype
    tensors = (
        torch.randn(*lead, k, generator=g).to(dtype),
        (torch.randn(R, k, generator=g) * 0.1).to(adapter_dtype),
        (torch.randn(n, R, generator=g) * 0.1).to(adapter_dtype),
        torch.randn(n, generator=g).to(dtype),
    )
    return tuple(t.requires_grad_(grad) for t in tensors)


def call(weight, tensors, **kwargs):
    x, a, b, bias = tensors
    return fastlora.nf4_linear(x, weight, bias, a, b, SCALING, **kwargs)


def loss(y):
    return y.float().square().sum()


class Reference(torch.autograd.Function):
    """reference.py's forward with reference.py's gradients: what gradcheck holds to each other."""

    @staticmethod
    def forward(ctx, x, dense, bias, a, b):
        y, u = reference.nf4_linear(x, dense, bias, a, b, SCALING)
        ctx.save_for_backward(x, u, dense, a, b)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, u, dense, a, b = ctx.saved_tensors
        dx, v = reference.nf4_linear_grad_input(dy, dense, a, b, SCALING)
        return (
            dx,
            None,
            reference.grad_bias(dy),
            reference.lora_grad_a(v, x),
            reference.lora_grad_b(dy, u, SCALING),
        )


def test_the_reference_passes_gradcheck():
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    dense = draw(6, 10).detach()
    assert torch.autograd.gradcheck(
        lambda x, bias, a, b: Reference.apply(x, dense, bias, a, b),
        (draw(2, 3, 10), draw(6), draw(4, 10), draw(6, 4)),
    )


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["adapters_as_x", "adapters_float32"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("lead", "n", "k"), [((2, 3), N, K), ((2, 3), 48, 128), ((5, 14), 48, 128)], ids=["odd", "few", "many"]
)
def test_forward_and_gradients_match_the_reference(layer_device, dtype, adapter_dtype, lead, n, k):
    weight = make_weight(n, k)
    tensors = inputs(dtype, adapter_dtype, lead, n=n, k=k)
    y = call(weight, tensors)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    got = torch.autograd.grad(y, tensors, dy)

    exact = tuple(t.detach().double().requires_grad_() for t in tensors)
    x, a, b, bias = exact
    want_y = Reference.apply(x, weight.dequantize(torch.float32).double(), bias, a, b)
    want = torch.autograd.grad(want_y, exact, dy.double())
    assert y.dtype == dtype
    assert relative_error(y, want_y) < TOLERANCE[dtype]
    for name, t, g, w in zip(("x", "lora_a", "lora_b", "bias"), tensors, got, want, strict=True):
        assert g.dtype == t.dtype, name
        assert g.shape == t.shape, name
        assert relative_error(g, w) < TOLERANCE[dtype], name


@pytest.mark.parametrize(
    "needed", [(0,), (1,), (2,), (3,), (1, 2), (0, 1), (0, 2), (0, 3), (0, 1, 2, 3)], ids=str
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@in_both_dtypes
def test_only_the_gradients_asked_for_and_the_same_ones(layer_device, weight, needed, dropout, dtype):
    def run(which):
        tensors = inputs(dtype, torch.float32, grad=False)
        for i in which:
            tensors[i].requires_grad_()
        torch.manual_seed(0)
        loss(call(weight, tensors, dropout=dropout)).backward()
        return [t.grad for t in tensors]

    everything, some = run((0, 1, 2, 3)), run(needed)
    for i, (full, got) in enumerate(zip(everything, some, strict=True)):
        assert (got is not None) == (i in needed)
        # v comes from the kernel when dx is wanted and from a matrix product when it is not.
        assert got is None or relative_error(got, full) < TOLERANCE[dtype]


def test_what_is_saved_is_x_u_and_the_weight_itself(weight):
    tensors = inputs(lead=(5,))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        call(weight, tensors)
    x, a, b, _ = tensors
    ours = {t.data_ptr() for t in (x, a, b, weight.packed, weight.scales, weight.nested)}
    extra = [t for t in packed if t.data_ptr() not in ours]
    assert [tuple(t.shape) for t in extra] == [(5, R)]


def test_x_is_not_kept_when_only_x_learns(weight):
    x, a, b, bias = inputs(grad=False)
    x.requires_grad_()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        call(weight, (x, a, b, bias))
    assert all(t.data_ptr() != x.data_ptr() for t in packed)


def test_without_gradients_nothing_is_recorded(weight):
    x, a, b, bias = inputs()
    with torch.no_grad():
        assert call(weight, (x, a, b, bias)).grad_fn is None
    with torch.inference_mode():
        y = call(weight, (x, a, b, bias))
    assert y.is_inference()
    assert torch.equal(y, call(weight, (x, a, b, bias)))
    assert call(weight, inputs(grad=False)).grad_fn is None


@in_both_dtypes
def test_without_adapters_or_bias(layer_device, weight, dtype):
    x = inputs(dtype)[0]
    y = fastlora.nf4_linear(x, weight)
    (dx,) = torch.autograd.grad(y.sum(), x)  # an expanded scalar arrives as dy
    dense = weight.dequantize().double()
    assert relative_error(y, x.double() @ dense.T) < TOLERANCE[dtype]
    assert relative_error(dx, dense.sum(0).expand_as(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (1,), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@in_both_dtypes
def test_any_leading_shape(layer_device, weight, lead, dropout, dtype):
    tensors = inputs(dtype, lead=lead)
    y = call(weight, tensors, dropout=dropout)
    assert y.shape == (*lead, N)
    grads = torch.autograd.grad(loss(y), tensors)
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    if 0 in lead:
        assert all(not g.any() for g in grads)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@in_both_dtypes
def test_strides_do_not_matter(layer_device, weight, dropout, dtype):
    """Every tensor, and dy, as a view with other strides."""

    def run(tensors, dy):
        torch.manual_seed(0)
        return torch.autograd.grad(call(weight, tensors, dropout=dropout), tensors, dy)

    def strided(t):  # the same values with gaps, last dimension first in memory
        wide = torch.zeros(*reversed(t.shape), 2, dtype=t.dtype)
        view = wide.permute(*reversed(range(t.dim() + 1)))[0]
        view.copy_(t.detach())
        return view.requires_grad_(t.requires_grad)

    tensors = inputs(dtype)
    dy = torch.randn(2, 3, N).to(dtype)
    views = tuple(strided(t) for t in tensors)
    assert not views[0].is_contiguous()
    for got, want in zip(run(views, strided(dy)), run(tensors, dy), strict=True):
        assert relative_error(got, want) < TOLERANCE[dtype]


@in_both_dtypes
def test_dropout_is_in_the_low_rank_term_alone_and_backward_sees_the_same_mask(layer_device, weight, dtype):
    x, a, b, bias = tensors = inputs(dtype, torch.float32)
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, (1,)))  # what the function draws
    mask = reference.lora_dropout(torch.ones_like(x), seed, 0.4)
    torch.manual_seed(5)
    y = call(weight, tensors, dropout=0.4)
    got = torch.autograd.grad(loss(y), tensors)
    dense = weight.dequantize().double()
    want_y = (
        x.double() @ dense.T + SCALING * ((x.double() * mask) @ a.double().T) @ b.double().T + bias.double()
    )
    want = torch.autograd.grad(want_y.square().sum(), tensors)
    assert relative_error(y, want_y) < TOLERANCE[dtype]
    for name, g, w in zip(("x", "lora_a", "lora_b", "bias"), got, want, strict=True):
        assert relative_error(g, w) < 2 * TOLERANCE[dtype], name  # y, too, is rounded before it comes back


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@in_both_dtypes
def test_gradient_checkpointing_changes_no_bit(layer_device, weight, reentrant, dropout, dtype):
    def run(wrap):
        tensors = inputs(dtype)
        torch.manual_seed(4)
        y = wrap(lambda *t: call(weight, t, dropout=dropout), *tensors)
        loss(y).backward()
        return [y, *(t.grad for t in tensors)]

    plain = run(lambda f, *t: f(*t))
    again = run(lambda f, *t: checkpoint(f, *t, use_reentrant=reentrant))
    for p, c in zip(plain, again, strict=True):
        assert torch.equal(p, c)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_tensors_own(
    layer_device, weight, dtype, dropout
):
    tensors = inputs()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=dtype):
        y = call(weight, tensors, dropout=dropout)
        got = torch.autograd.grad(loss(y), tensors)  # backward inside the region too
    assert y.dtype == dtype
    assert [g.dtype for g in got] == [torch.float32] * 4
    torch.manual_seed(0)
    want = torch.autograd.grad(loss(call(weight, tensors, dropout=dropout)), tensors)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < 2 * TOLERANCE[dtype]


def test_autocast_does_not_touch_a_float32_backward(weight):
    """Forward outside, backward inside: the thin products must not be cast down."""
    tensors = inputs()
    want = torch.autograd.grad(loss(call(weight, tensors)), tensors)
    objective = loss(call(weight, tensors))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(objective, tensors)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_second_differentiation_is_a_clear_error(weight, dropout):
    tensors = inputs()
    first = torch.autograd.grad(loss(call(weight, tensors, dropout=dropout)), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="nf4_linear: expected one differentiation, got a second one"):
        first[0].sum().backward()


def test_create_graph_alone_is_harmless(weight):
    tensors = inputs()
    want = torch.autograd.grad(loss(call(weight, tensors)), tensors)
    got = torch.autograd.grad(loss(call(weight, tensors)), tensors, create_graph=True)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_the_same_bits_every_time(layer_device, weight):
    tensors = inputs(torch.bfloat16, torch.float32, lead=(33,))
    first, second = (torch.autograd.grad(loss(call(weight, tensors)), tensors) for _ in range(2))
    for f, s in zip(first, second, strict=True):
        assert torch.equal(f, s)


def test_bad_arguments(weight):
    x, a, b, bias = inputs(grad=False)
    with pytest.raises(
        ValueError, match=r"nf4_linear: expected x of shape \(\.\.\., 72\) .*got \(2, 3, 71\)"
    ):
        fastlora.nf4_linear(x[..., :71], weight)  # 71 and 72 columns take the same 36 bytes a row
    with pytest.raises(ValueError, match=r"nf4_linear: expected a weight of shape \(n, k\), got \(2, 4, 8\)"):
        fastlora.nf4_linear(x, fastlora.quantize_nf4(torch.zeros(2, 4, 8)))
    for needs_grad in (False, True):
        for dropout in (0.0, 0.4):
            t = x.clone().requires_grad_(needs_grad)
            with pytest.raises(ValueError, match="lora_a and lora_b together, got only one"):
                fastlora.nf4_linear(t, weight, None, a, None, dropout=dropout)
            with pytest.raises(ValueError, match="lora_a and lora_b together, got only one"):
                fastlora.nf4_linear(t, weight, None, None, b, dropout=dropout)
            with pytest.raises(ValueError, match=r"expected lora_a of shape \(r, 72\), got \(7, 71\)"):
                fastlora.nf4_linear(t, weight, None, a[:, :71], b, dropout=dropout)
            with pytest.raises(TypeError, match="expected bias in x's dtype"):
                fastlora.nf4_linear(t, weight, bias.double(), a, b, dropout=dropout)
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"expected dropout in \[0, 1\), got"):
            fastlora.nf4_linear(x, weight, None, a, b, dropout=p)
    with pytest.raises(
        TypeError, match=r"nf4_linear: expected x in float32, bfloat16 or float16, got torch.float64"
    ):
        fastlora.nf4_linear(x.double(), weight)
