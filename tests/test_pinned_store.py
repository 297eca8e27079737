"""States that leave a CUDA device: the order of copies and updates, and who leaves when, on a device that
checks it (fake_device.py). On a real one: test_cuda_optimizers.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bits import assert_same_bits
from fake_device import FakeDevice
from torch import Tensor, nn

import fastlora
from fastlora import optim
from fastlora.pinned_store import PinnedStore

BOTH = (fastlora.PagedAdamW, fastlora.PagedAdamW8bit)
SIZE = 1 << 17  # elements: their codes and their float32 moments are paged
STATE_BYTES = {fastlora.PagedAdamW: 8 * SIZE, fastlora.PagedAdamW8bit: 2 * SIZE}


def parameters(count: int = 5) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=generator)) for n in [SIZE] * count + [100]]


def draw_gradients(optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)


def step(optimizer: torch.optim.Optimizer, number: int) -> None:
    draw_gradients(optimizer, number)
    optimizer.step()


@contextmanager
def fake_devices(deaf: str = "") -> Iterator[list[FakeDevice]]:
    """Optimisers made in here have a fake device each, listed here, and update in its main stream."""
    made: list[FakeDevice] = []

    def of(self, device):
        if device not in self.cuda:
            made.append(FakeDevice(seed=len(made), deaf=deaf))
            self.cuda[device] = PinnedStore(made[-1], self.cpu.resident_bytes)
        return self.cuda[device]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim._Stores, "of", of)
        patch.setattr(fastlora.PagedAdamW, "_update", _later(fastlora.PagedAdamW._update))
        yield made


def _later(update):
    """The update, but its kernel goes into the main stream and runs when that comes to it."""

    def updated(self, p: Tensor, group: dict) -> None:
        device = self._stores.of(p.device)._device
        make_kernel = type(self)._kernel

        def kernel(q: Tensor, grad: Tensor, state: dict[str, Tensor]):
            now = {name: t.detach() for name, t in state.items()}  # where they are at this moment
            run = make_kernel(self, q, grad, now)
            moments = [t for name, t in now.items() if name != "step"]
            return lambda *numbers: device.run(
                device.main, lambda: run(*numbers), reads=[grad], writes=[q, *moments]
            )

        self._kernel = kernel
        try:
            update(self, p, group)
        finally:
            del self._kernel

    return updated


def plain(make, steps: int, count: int = 5) -> list[nn.Parameter]:
    """What the parameters should be, by an optimiser on a CPU."""
    found = parameters(count)
    optimizer = make(found, lr=0.1)
    for number in range(steps):
        step(optimizer, number)
    return found


def check_same(got: list[nn.Parameter], want: list[nn.Parameter]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same_bits(a.detach(), b.detach(), f"parameter {i}")


def away(optimizer, device: FakeDevice) -> list[bool]:
    """By parameter: whether its first moment is on the host."""
    states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    return [device.is_on_host(state.get("state1", state.get("exp_avg"))) for state in states]


# --- the order of things ----------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [0, 1, 2, 5])
@pytest.mark.parametrize("make", BOTH)
def test_a_bound_changes_no_bit(make, held: int) -> None:
    want = plain(make, 4)
    with fake_devices() as devices:
        ours = parameters()
        optimizer = make(ours, lr=0.1, resident_bytes=max(1, held * STATE_BYTES[make]))
        for number in range(4):
            step(optimizer, number)
        devices[0].finish()
    check_same(ours, want)
    assert away(optimizer, devices[0]) == [i >= held for i in range(5)] + [False]
    assert devices[0].staged == 4 * (5 - held) * STATE_BYTES[make]


@pytest.mark.parametrize("deaf", ["main", "incoming", "outgoing"])
def test_a_missing_wait_is_found(deaf: str) -> None:
    def two_steps() -> None:
        optimizer = fastlora.PagedAdamW(parameters(), lr=0.1, resident_bytes=1)
        step(optimizer, 0)
        step(optimizer, 1)

    message = rf"^{deaf} (reads|writes) bytes that \w+ may still be"
    with fake_devices(deaf), pytest.raises(AssertionError, match=message):
        two_steps()


def test_the_next_one_comes_while_one_is_used() -> None:
    store = PinnedStore(device := FakeDevice(), resident_bytes=1)
    first, second = (store.zeros((SIZE,), torch.float32) for _ in range(2))
    store.will_need(first)
    store.will_need(second)
    assert not device.is_on_host(first)
    assert not device.is_on_host(second)
    store.ready(first)
    device.run(device.main, lambda: None, writes=[first])
    with pytest.raises(AssertionError, match=r"^main reads bytes that incoming may still be writing"):
        device.run(device.main, lambda: None, reads=[second])
    store.done_with(first)
    assert device.is_on_host(first)
    with pytest.raises(AssertionError, match=r"^host reads bytes that outgoing may still be writing"):
        device.host_reads(first)
    store.settle()
    assert not device.host_reads(first).any()


def test_a_step_that_fails_spoils_no_later_one() -> None:
    """Those before the one that failed are updated, as they are where only they have gradients."""
    want = parameters()
    reference = fastlora.PagedAdamW(want, lr=0.1)
    for number, failing in enumerate((1, 3, 0)):
        draw_gradients(reference, 10 + number)
        for p in want[failing:]:
            p.grad = None
        reference.step()
        step(reference, number)
    with fake_devices() as devices:
        ours = parameters()
        optimizer = fastlora.PagedAdamW(ours, lr=0.1, resident_bytes=1)
        update = optimizer._update
        for number, failing in enumerate((1, 3, 0)):

            def fail(p: Tensor, group: dict, at: Tensor = ours[failing]) -> None:
                if p is at:
                    raise KeyError("a kernel that fails")
                update(p, group)

            optimizer._update = fail
            with pytest.raises(KeyError, match="a kernel that fails"):
                step(optimizer, 10 + number)
            optimizer._update = update
            step(optimizer, number)
        devices[0].finish()
    check_same(ours, want)


# --- who leaves, and when ---------------------------------------------------------------------------------


def test_everything_stays_where_there_is_room() -> None:
    with fake_devices() as devices:
        optimizer = fastlora.PagedAdamW(parameters(), lr=0.1)
        for number in range(3):
            step(optimizer, number)
    assert away(optimizer, devices[0]) == [False] * 6
    assert devices[0].staged == 0
    assert devices[0].given_back == 0


@pytest.mark.parametrize("make", BOTH)
def test_what_was_used_longest_ago_leaves_when_room_is_short(make) -> None:
    want = plain(make, 4)
    with fake_devices() as devices:
        ours = parameters()
        optimizer = make(ours, lr=0.1)
        step(optimizer, 0)
        device = devices[0]
        device.free = device.total // 32 - STATE_BYTES[make] - 1  # of one parameter, and a byte more
        step(optimizer, 1)
        device.free = device.total // 32
        step(optimizer, 2)
        step(optimizer, 3)
        device.finish()
    check_same(ours, want)
    assert away(optimizer, device) == [True, True, False, False, False, False]
    assert device.given_back == 1


def test_states_begin_on_the_host_where_they_would_crowd_out_others() -> None:
    store = PinnedStore(device := FakeDevice())
    device.free = device.total // 32 + 4 * SIZE
    fits, crowds = store.zeros((SIZE,), torch.float32), store.zeros((SIZE + 1,), torch.float32)
    assert not device.is_on_host(fits)
    assert device.is_on_host(crowds)
    assert not crowds.any()


def test_an_allocation_that_fails() -> None:
    store = PinnedStore(device := FakeDevice())
    tensors = [store.zeros((SIZE,), torch.float32) for _ in range(2)]
    device.refusals = 1
    tensors.append(store.zeros((SIZE,), torch.float32))
    assert [device.is_on_host(t) for t in tensors] == [False, False, True]
    store.done_with(tensors[0])  # now the second is the one used longest ago
    device.refusals = 1
    store.ready(tensors[2])
    assert [device.is_on_host(t) for t in tensors] == [False, True, False]
    store.done_with(tensors[2])
    device.refusals = 9
    with pytest.raises(torch.OutOfMemoryError):
        store.ready(tensors[1], tensors[2])
    assert [device.is_on_host(t) for t in tensors] == [True, True, True]
    device.refusals = 0
    store.settle()
    assert not any(device.host_reads(t).any() for t in tensors)


def test_who_leaves_for_the_room_of_its_own_fellow_comes_back_with_it() -> None:
    store = PinnedStore(device := FakeDevice())
    first = store.zeros((SIZE,), torch.float32)
    device.refusals = 1
    second = store.zeros((SIZE,), torch.float32)
    for turn in range(3):
        device.refusals = 1 if turn == 0 else 0
        store.will_need(second, first)
        store.ready(second, first)
        assert not device.is_on_host(first)
        assert not device.is_on_host(second)
        for t in (first, second):
            place = t.detach()
            device.run(device.main, lambda place=place: place.add_(1), reads=[place], writes=[place])
        store.done_with(second, first)
    store.settle()
    for t in (first, second):
        assert device.is_on_host(t)
        assert bool((device.host_reads(t) == 3).all())


def test_others_are_left_alone() -> None:
    store = PinnedStore(FakeDevice(), resident_bytes=1)
    t = torch.ones(3)
    place = t.data_ptr()
    store.will_need(t)
    store.ready(t)
    store.done_with(t)
    assert not store.owns(t)
    assert t.data_ptr() == place


def test_bad_bounds() -> None:
    with pytest.raises(ValueError, match=r"^PinnedStore: expected resident_bytes of 1 or more, got 0"):
        PinnedStore(FakeDevice(), 0)


def test_parameters_that_cannot_be_updated(monkeypatch) -> None:
    optimizer = fastlora.PagedAdamW(parameters())
    parameter = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda:0"), grad=None)
    monkeypatch.setattr(optim, "_C", SimpleNamespace(cuda_built=False))
    message = r"^PagedAdamW: expected a build with CUDA kernels for parameters on cuda:0, got none"
    with pytest.raises(RuntimeError, match=message):
        optimizer._check(parameter)
    monkeypatch.setattr(optim, "_C", SimpleNamespace(cuda_built=True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"^PagedAdamW: expected a step that no CUDA graph captures, got one"
    ):
        optimizer._check(parameter)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    optimizer._check(parameter)


# --- state dicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", BOTH)
def test_state_dicts_pass_between_devices(make, tmp_path: Path) -> None:
    want = plain(make, 4)
    with fake_devices() as devices:
        first = parameters()
        optimizer = make(first, lr=0.1, resident_bytes=1)
        step(optimizer, 0)
        step(optimizer, 1)
        state = optimizer.state_dict()
        for values in state["state"].values():
            for name, t in values.items():
                if name != "step" and devices[0].is_on_host(t):
                    devices[0].host_reads(t)
        devices[0].finish()
        torch.save(state, tmp_path / "state.pt")
    second = [nn.Parameter(p.detach().clone()) for p in first]
    on_cpu = make(second, lr=0.5)
    on_cpu.load_state_dict(torch.load(tmp_path / "state.pt"))
    step(on_cpu, 2)
    with fake_devices() as devices:
        third = [nn.Parameter(p.detach().clone()) for p in second]
        again = make(third, lr=0.5, resident_bytes=STATE_BYTES[make])
        again.load_state_dict(on_cpu.state_dict())
        step(again, 3)
        devices[0].finish()
    check_same(third, want)


def test_copies_are_apart() -> None:
    want = plain(fastlora.PagedAdamW, 3)
    with fake_devices() as devices:
        optimizer = fastlora.PagedAdamW(parameters(), lr=0.1, resident_bytes=1)
        step(optimizer, 0)
        devices[0].finish()
        twin = copy.deepcopy(optimizer)
        for one in (optimizer, twin):
            step(one, 1)
            step(one, 2)
        for device in devices:
            device.finish()
    assert len(devices) == 2
    for one in (optimizer, twin):
        check_same(one.param_groups[0]["params"], want)
