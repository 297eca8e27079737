"""The optimisers on a real device: the CPU's bits, states that leave it and come back, streams, nothing that
waits. What needs none is in test_adamw.py (the kernels, emulated) and test_pinned_store.py."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from bits import assert_same_bits
from torch import nn

import fastlora
from fastlora import _C

NO_DEVICE = not (_C.cuda_built and torch.cuda.is_available())
pytestmark = pytest.mark.skipif(NO_DEVICE, reason="no CUDA device, or a build without CUDA kernels")

BOTH = (fastlora.PagedAdamW, fastlora.PagedAdamW8bit)
SIZE = 1 << 17
STATE_BYTES = {fastlora.PagedAdamW: 8 * SIZE, fastlora.PagedAdamW8bit: 2 * SIZE}


def parameters(device: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(n, generator=generator).to(device, dtype))
        for n in (*[SIZE] * 5, SIZE + 3, 100)
    ]


def step(optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
    optimizer.step()


def check_same(got: list[nn.Parameter], want: list[nn.Parameter]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same_bits(a.detach().cpu(), b.detach().cpu(), f"parameter {i}")


def places(optimizer: torch.optim.Optimizer) -> list[str]:
    """By parameter: where its first moment is."""
    states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    return [state.get("state1", state.get("exp_avg")).device.type for state in states]


@pytest.mark.parametrize("held", [None, 0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", BOTH)
def test_bits_of_the_cpu(make, dtype: torch.dtype, held: int | None) -> None:
    """On the device, from pinned memory, and mixed; step after step, so that what left has come back."""
    ours, want = parameters("cuda", dtype), parameters("cpu", dtype)
    bound = None if held is None else max(1, held * STATE_BYTES[make])
    optimizer, reference = make(ours, lr=0.1, resident_bytes=bound), make(want, lr=0.1)
    for number in range(6):
        step(optimizer, number)
        step(reference, number)
    check_same(ours, want)
    staying = 7 if held is None else held
    assert places(optimizer) == [("cuda" if i < staying or i == 6 else "cpu") for i in range(7)]


def test_bits_on_every_run() -> None:
    runs = []
    for _ in range(2):
        ours = parameters("cuda")
        optimizer = fastlora.PagedAdamW8bit(ours, lr=0.1, resident_bytes=1)
        for number in range(4):
            step(optimizer, number)
        runs.append(ours)
    check_same(*runs)


@pytest.mark.parametrize("make", BOTH)
def test_what_was_used_longest_ago_leaves(make, monkeypatch) -> None:
    """Under pressure that the driver is made to report."""
    ours, want = parameters("cuda"), parameters("cpu")
    optimizer, reference = make(ours, lr=0.1), make(want, lr=0.1)
    step(optimizer, 0)
    step(reference, 0)
    total = torch.cuda.mem_get_info()[1]
    with monkeypatch.context() as patch:
        short = total // 32 - STATE_BYTES[make] - 1
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (short, total))
        step(optimizer, 1)
        step(reference, 1)
    assert places(optimizer) == ["cpu"] * 2 + ["cuda"] * 5
    for number in range(2, 5):
        step(optimizer, number)
        step(reference, number)
    check_same(ours, want)


def test_on_another_stream() -> None:
    ours, want = parameters("cuda"), parameters("cpu")
    reference = fastlora.PagedAdamW(want, lr=0.1)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        optimizer = fastlora.PagedAdamW(ours, lr=0.1, resident_bytes=1)
        for number in range(4):
            torch.cuda._sleep(20_000_000)
            step(optimizer, number)
            step(reference, number)
    stream.synchronize()
    check_same(ours, want)


@pytest.mark.parametrize("make", BOTH)
def test_nothing_waits_for_the_device(make) -> None:
    optimizer = make(parameters("cuda"), lr=0.1, resident_bytes=1)
    step(optimizer, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("make", BOTH)
def test_state_dicts_pass_between_devices(make, tmp_path: Path) -> None:
    devices = ("cuda", "cpu", "cuda")
    want = parameters("cpu")
    reference = make(want, lr=0.1)
    ours = parameters("cpu")
    for turn, device in enumerate(devices):
        ours = [nn.Parameter(p.detach().to(device)) for p in ours]
        optimizer = make(ours, lr=0.1, resident_bytes=STATE_BYTES[make])
        if turn:
            optimizer.load_state_dict(torch.load(tmp_path / "state.pt"))
        for number in (2 * turn, 2 * turn + 1):
            step(optimizer, number)
            step(reference, number)
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    check_same(ours, want)


def test_a_capture_is_refused() -> None:
    optimizer = fastlora.PagedAdamW(parameters("cuda"), lr=0.1)
    step(optimizer, 0)
    with (
        pytest.raises(RuntimeError, match=r"^PagedAdamW: expected a step that no CUDA graph captures"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "offset"), itertools.product((torch.float32, torch.bfloat16), (1, 3)), ids=str
)
def test_parameters_at_odd_addresses(dtype: torch.dtype, offset: int) -> None:
    room = torch.zeros(10_000, device="cuda", dtype=dtype)
    p, want = nn.Parameter(room[offset : offset + 5000]), nn.Parameter(torch.zeros(5000, dtype=dtype))
    optimizers = [fastlora.PagedAdamW8bit([it], lr=0.1) for it in (p, want)]
    for number, optimizer in itertools.product(range(3), optimizers):
        step(optimizer, number)
    check_same([p], [want])
