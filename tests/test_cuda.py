"""What only a real device can show: streams, graphs, several devices. What the kernels compute is compared
with the reference by the tests of the ops and of the layer, on this device too."""

import copy

import pytest
import torch
from tolerances import relative_error
from torch import nn

import fastlora
from fastlora import _C, QLinear, cuda, ops

BF16 = torch.bfloat16
K, N = 512, 768
NO_DEVICE = not (_C.cuda_built and torch.cuda.is_available())
needs_device = pytest.mark.skipif(NO_DEVICE, reason="no CUDA device, or a build without CUDA kernels")


def test_a_build_without_cuda_says_how_to_get_it():
    class NotBuilt(cuda.Device):
        kernels = None

    message = (
        r"nf4_quantize: expected CPU tensors, got CUDA ones; .* no CUDA kernels: install nvcc \(pip install"
    )
    with pytest.raises(RuntimeError, match=message):
        ops.CUDA_OPS["nf4_quantize"](NotBuilt(), torch.randn(64), 64, True, True)


def trained(k=K, n=N, dropout=0.0, device="cuda"):
    """A layer whose adapter does something."""
    torch.manual_seed(0)
    layer = QLinear(k, n, rank=16, dropout=dropout, dtype=BF16, device=device)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def draw(seed, m, device="cuda"):
    """x and dy. Drawn on the CPU, so that every device gets the same."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(m, size, generator=generator).to(device, BF16) for size in (K, N))
    return x.requires_grad_(), dy


def forward_and_backward(layer, x, dy):
    """The output and every gradient."""
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B, layer.bias), dy)]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- the format -------------------------------------------------------------------------------------------


@needs_device
def test_a_graph_replays_on_new_weights():
    weight = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    fastlora.quantize_nf4(weight)  # loads the kernels and the map before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = fastlora.quantize_nf4(weight, check_finite=False)
        dense = q.dequantize()
    for seed in range(3):
        torch.manual_seed(seed)
        weight.copy_(torch.randn_like(weight))
        graph.replay()
        torch.cuda.synchronize()
        want = fastlora.quantize_nf4(weight.cpu())
        assert q.to("cpu") == want
        assert torch.equal(dense.cpu(), want.dequantize())


@needs_device
def test_a_capture_with_the_check_is_refused():
    weight = torch.randn(64, 64, device="cuda")
    fastlora.quantize_nf4(weight)
    with (
        pytest.raises(RuntimeError, match="expected check_finite=False"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        fastlora.quantize_nf4(weight)


@needs_device
def test_the_current_stream_is_used():
    """A kernel on another stream would read the weight before the slow work that fills it is done."""
    stream = torch.cuda.Stream()
    weight, source = torch.zeros(1024, 1024, device="cuda"), torch.randn(1024, 1024, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        weight.copy_(source)
        q = fastlora.quantize_nf4(weight, check_finite=False)
    stream.synchronize()
    assert q.to("cpu") == fastlora.quantize_nf4(source.cpu())


@needs_device
def test_nothing_waits_for_the_device():
    weight = torch.randn(256, 256, device="cuda")
    q = fastlora.quantize_nf4(weight)
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            fastlora.quantize_nf4(weight, check_finite=False)
            q.dequantize()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_device
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_the_tensors_device_is_used():
    weight = torch.randn(64, 128, device="cuda:1")
    q = fastlora.quantize_nf4(weight)
    assert q.packed.device == weight.device
    assert q.to("cpu") == fastlora.quantize_nf4(weight.cpu())


# --- the layer --------------------------------------------------------------------------------------------


@needs_device
@pytest.mark.parametrize("m", [1, 4, 64])
def test_a_forward_in_a_graph(m):
    layer = trained().eval()
    x = draw(0, m)[0].detach()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        layer(x)  # loads the kernels and the map before the capture
        with torch.cuda.graph(graph):
            y = layer(x)
        for seed in range(3):
            x.copy_(draw(seed, m)[0])
            graph.replay()
            assert torch.equal(y, layer(x))


@needs_device
@pytest.mark.parametrize("m", [64, 4096])
def test_a_training_step_in_a_graph(m):
    """Of two layers, so that the gradient of an input is in it too; all in kernels at 64 rows, and with
    torch's products at 4096."""

    def step(model, optimizer, x, target):
        optimizer.zero_grad(set_to_none=True)
        loss = (model(x).float() - target).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    def begin():
        model = nn.Sequential(trained(K, N), trained(N, K))
        learning = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(learning, lr=1e-3, eps=1e-3, capturable=True), learning

    def batch(seed):
        generator = torch.Generator().manual_seed(seed)
        x, target = (torch.randn(m, K, generator=generator) for _ in range(2))
        return x.to("cuda", BF16), target.to("cuda")

    model, optimizer, learning = begin()
    x, target = batch(0)
    # Before the capture, and on another stream than the default one: gradients are added up on the stream
    # where their parameter was first used.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, optimizer, x, target)
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad(set_to_none=True)  # so that the capture allocates them, in memory of the graph's own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(model, optimizer, x, target)

    eager_model, eager_optimizer, eager_learning = begin()
    for _ in range(3):
        step(eager_model, eager_optimizer, *batch(0))
    for seed in range(1, 4):
        for static, new in zip((x, target), batch(seed), strict=True):
            static.copy_(new)
        graph.replay()
        eager_loss = step(eager_model, eager_optimizer, *batch(seed))
        if m == 64:
            assert same_bits((loss, *learning), (eager_loss, *eager_learning))
        else:  # another algorithm of cuBLAS is another order of sums
            torch.testing.assert_close(loss, eager_loss, rtol=1e-2, atol=0.0)
            for got, want in zip(learning, eager_learning, strict=True):
                assert relative_error(got, want) < 1e-2


@needs_device
@pytest.mark.parametrize("m", [4, 64, 300])
def test_two_streams_at_once_give_the_bits_of_one(m):
    """Scratch belongs to a call: no two of them meet in it."""
    layer = trained()
    batches = [draw(seed, m) for seed in range(16)]
    want = [forward_and_backward(layer, *batch) for batch in batches]
    here, streams = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(here)
    got = []
    for i, batch in enumerate(batches):
        with torch.cuda.stream(streams[i % 2]):
            got.append(forward_and_backward(layer, *batch))
    for stream in streams:
        here.wait_stream(stream)
    torch.cuda.synchronize()
    assert all(same_bits(*pair) for pair in zip(got, want, strict=True))


@needs_device
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("m", [4, 64, 4096])
def test_nothing_in_the_layer_waits_for_the_device(m, dropout):
    layer, (x, dy) = trained(dropout=dropout), draw(1, m)
    forward_and_backward(layer, x, dy)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(layer, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_device
@pytest.mark.parametrize("m", [4, 64])
def test_compiled_into_graphs(m):
    pytest.importorskip("triton", reason="torch.compile has no backend for CUDA without triton")
    torch._dynamo.reset()
    layer = trained().eval()
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    counters = torch._dynamo.utils.counters["inductor"]
    skipped = counters["cudagraph_skips"]
    with torch.no_grad():
        for seed in range(4):  # the first runs warm up, the next one captures
            x = draw(seed, m)[0].detach()
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(x).clone()  # the next run writes over it
            assert torch.equal(y, layer(x))
    assert counters["cudagraph_skips"] == skipped
    torch._dynamo.reset()


@needs_device
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
@pytest.mark.parametrize("m", [4, 64, 4096])
def test_a_layer_on_a_device_that_is_not_the_current_one(m):
    first, second = trained(), copy.deepcopy(trained()).to("cuda:1")
    assert torch.cuda.current_device() == 0
    want = forward_and_backward(first, *draw(1, m))
    got = forward_and_backward(second, *draw(1, m, "cuda:1"))
    for g, w in zip(got, want, strict=True):
        assert g.device == torch.device("cuda:1")
        assert relative_error(g.cpu(), w.cpu()) < 1e-2  # the devices may be of two kinds
