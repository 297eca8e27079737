"""The dense route beyond what the ops' tests ask of it: several slabs, and on a device graphs and waits."""

from __future__ import annotations

import pytest
import torch
from devices import device
from linear_cases import FLOATS, Case, make_inputs
from tolerances import TOLERANCES, assert_within, linear_bound

from fastlora import _C, cuda_dense, cuda_linear, reference

op = torch.ops.fastlora

needs_device = pytest.mark.skipif(
    not (_C.cuda_built and torch.cuda.is_available()),
    reason="no CUDA device, or a build without CUDA kernels",
)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_several_slabs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rank: int, bias: bool) -> None:
    """Of 128 rows or columns each, and what is left."""
    monkeypatch.setattr(cuda_dense, "_SLAB_BYTES", 1)
    monkeypatch.setattr(cuda_dense, "_MOST_BYTES", 1)
    inputs = make_inputs(Case(20, 300, 299, rank, 64, dtype, bias=bias, scaling=0.5), seed=3)
    dense, a, b = inputs.weight.dense, inputs.lora_a, inputs.lora_b
    want_y, _ = reference.nf4_linear(inputs.x, dense, inputs.bias, a, b, 0.5)
    want_dx, _ = reference.nf4_linear_grad_input(inputs.dy, dense, a, b, 0.5)
    with device("cuda_emulated_dense"):
        y = op.nf4_linear(*inputs.linear)
        dx, _ = op.nf4_linear_grad_input(*inputs.grad_input)
    frobenius = TOLERANCES[dtype].frobenius
    assert_within("y", y, want_y, linear_bound(inputs.x, dense, a, b, 0.5, want_y, dtype), frobenius)
    a, b = (None, None) if a is None or b is None else (b.T, a.T)
    assert_within("dx", dx, want_dx, linear_bound(inputs.dy, dense.T, a, b, 0.5, want_dx, dtype), frobenius)


@pytest.mark.parametrize(
    ("m", "total", "other", "step"),
    [
        (4096, 4096, 4096, 2048),
        (4096, 14336, 4096, 2048),
        (4096, 4096, 14336, 1024),  # 29 MB: less than 1024 columns would not fill the device
        (8192, 4096, 14336, 512),
        (2048, 4096, 14336, 512),  # 2048 columns would be 59 MB
        (4096, 5120, 4096, 1792),
        (4096, 100, 4096, 100),
        (4096, 0, 64, 0),
        (1, 4096, 4096, 2048),
    ],
)
def test_slabs_fill_the_device_and_are_about_equal(m: int, total: int, other: int, step: int) -> None:
    assert cuda_dense._slab_size(m, total, other, 2, 132) == step


@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_graph_replays_without_waiting(dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(300, 1024, 512, 16, 64, dtype, scaling=0.5), seed=7)
    linear = [t.cuda() if isinstance(t, torch.Tensor) else t for t in inputs.linear]
    grad = [t.cuda() if isinstance(t, torch.Tensor) else t for t in inputs.grad_input]

    def step() -> list[torch.Tensor]:
        y, u = op.nf4_linear_with_u(*linear)
        return [y, u, *op.nf4_linear_backward(grad[0], u, *grad[1:])]

    with cuda_linear.use_route("dense"):
        step()  # loads the kernels and torch's before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        linear[0].copy_(torch.randn_like(linear[0]))
        graph.replay()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            wanted = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for got, want in zip(captured, wanted, strict=True):
        torch.testing.assert_close(got, want)
