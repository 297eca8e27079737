"""What only a real device can show: streams, graphs, several devices. The kernels' results are compared with
the reference by tests/test_nf4_levels.py, on this device too."""

import pytest
import torch

import fastlora
from fastlora import _C, cuda, ops

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
