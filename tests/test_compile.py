"""torch.compile over fastlora.nf4_linear and QLinear: whole graphs, by the real inductor."""

import pytest
import torch

import fastlora

N, K, R = 24, 40, 4


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    layer = fastlora.QLinear(K, N, rank=R, dropout=dropout, dtype=dtype)
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    return layer


@pytest.mark.parametrize(
    ("dynamic", "dtype"), [(False, torch.bfloat16), (True, torch.float32)], ids=["static_bf16", "dynamic_f32"]
)
def test_forward_and_training_step_in_one_graph(dynamic, dtype):
    model = layer(dtype=dtype)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for rows in (3, 5):
        x = torch.randn(2, rows, K, dtype=dtype, requires_grad=True)
        wanted = (x, model.lora_A, model.lora_B, model.bias)
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))
        want = torch.autograd.grad(model(x).float().square().sum(), wanted)
        got = torch.autograd.grad(compiled(x).float().square().sum(), wanted)
        for g, w in zip(got, want, strict=True):
            assert g.dtype == w.dtype
            torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance * w.abs().max().item())


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_layer_that_is_called_twice_with_dynamic_shapes(dropout):
    torch._dynamo.reset()
    one = fastlora.QLinear(64, 64, rank=4, dropout=dropout)
    torch.nn.init.normal_(one.lora_B)
    compiled = torch.compile(lambda x: one(one(x).relu()), fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (3, 5):
        x = torch.randn(m, 64, generator=torch.Generator().manual_seed(m))
        torch.manual_seed(0)
        got = compiled(x)
        torch.manual_seed(0)
        want = one(one(x).relu())
        if not dropout:  # a compiled graph draws other seeds
            torch.testing.assert_close(got, want)
        got.sum().backward()
        assert one.lora_A.grad.isfinite().all()


def test_dynamic_shapes_do_not_recompile():
    compiled = torch.compile(layer(), fullgraph=True, dynamic=True)
    counters = torch._dynamo.utils.counters
    compiled(torch.randn(7, K)).sum().backward()
    before = counters["stats"]["unique_graphs"]
    for rows in (8, 19, 300):
        compiled(torch.randn(rows, K)).sum().backward()
    assert counters["stats"]["unique_graphs"] == before


def test_the_loss_is_in_the_graph_and_training_goes_the_same_way():
    def train(wrap):
        model = layer()
        optimizer = torch.optim.SGD([model.lora_A, model.lora_B], lr=0.05)
        generator = torch.Generator().manual_seed(3)
        x, target = (torch.randn(16, size, generator=generator) for size in (K, N))
        step = wrap(lambda x, target: (model(x) - target).square().mean())
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            value = step(x, target)
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return losses

    eager = train(lambda f: f)
    compiled = train(lambda f: torch.compile(f, fullgraph=True))
    assert eager[-1] < eager[0]
    assert compiled == pytest.approx(eager, rel=1e-5)


def test_dropout_draws_anew_each_call_and_backward_sees_the_forward_mask():
    """With W = 0 and A, B the identity y is dropout(x) itself, and so dx is dropout(dy)."""
    size, p = 64, 0.25
    zero = fastlora.quantize_nf4(torch.zeros(size, size))
    eye = torch.eye(size)

    @torch.compile(fullgraph=True)
    def f(x):
        return fastlora.nf4_linear(x, zero, None, eye, eye.clone(), 1.0, dropout=p)

    x = torch.rand(32, size) + 1
    x.requires_grad_()
    masks = []
    for _ in range(2):
        y = f(x)
        dy = torch.rand(32, size) + 1
        (dx,) = torch.autograd.grad(y, x, dy)
        kept = y != 0
        assert torch.allclose(dx, torch.where(kept, dy / (1 - p), 0.0))
        assert 0.65 < kept.float().mean() < 0.85
        masks.append(kept)
    assert not torch.equal(*masks)


def test_the_functional_form_over_an_nf4_weight():
    weight = fastlora.quantize_nf4(torch.randn(N, K))
    compiled = torch.compile(lambda x: fastlora.nf4_linear(x, weight), fullgraph=True)
    x = torch.randn(3, K)
    assert torch.equal(compiled(x), fastlora.nf4_linear(x, weight))


def test_under_autocast():
    model = layer()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(3, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = model(x), compiled(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)
