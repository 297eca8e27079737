"""bench/'s clock for CUDA devices, on a simulated device and processor: two hands of time and a queue."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_parts import bench_on_path, module  # noqa: F401


class Simulated:
    """host and device: seconds. A launch takes the host `launch`, and the device does it when it has done
    what came before, but not before the launch."""

    clock_rate = 2e9

    def __init__(self):
        self.host = self.device = 0.0
        self.synchronised = 0

    def enqueue(self, launch, work):
        self.host += launch
        self.device = max(self.device, self.host) + work

    def synchronize(self):
        self.synchronised += 1
        self.host = max(self.host, self.device)

    def sleep(self, cycles):
        self.enqueue(3e-6, cycles / self.clock_rate)


@pytest.fixture
def simulated(monkeypatch):
    device = Simulated()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            device.enqueue(1e-6, 0.0)
            self.at = device.device

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", device.sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: device.host)
    return device


@pytest.fixture
def warm(simulated):
    return module("_timing_cuda").CudaClock(cold=False)


def samples(clock, call, count=5):
    watch = clock.watch(call, 0.0)
    for _ in range(count):
        watch.sample()
    return watch.times()


@pytest.mark.parametrize("launch", [20e-6, 400e-6])
def test_the_hosts_launches_are_no_part_of_the_time(simulated, warm, launch):
    def call():
        for _ in range(3):
            simulated.enqueue(launch, 5e-6)

    assert samples(warm, call) == pytest.approx([15e-6] * 5, rel=1e-3)


def test_a_host_that_slows_down_is_given_more_time(simulated, warm):
    launches = iter([20e-6] * 10 + [900e-6] * 100)

    def call():
        simulated.enqueue(next(launches), 5e-6)
        simulated.enqueue(next(launches), 5e-6)

    assert samples(warm, call, 12) == pytest.approx([10e-6] * 12, rel=1e-3)


def test_a_call_that_waits_for_the_device_is_not_tried_for_ever(simulated, warm):
    calls = []

    def call():
        calls.append(1)
        simulated.enqueue(10e-6, 5e-6)
        simulated.synchronize()

    samples(warm, call, 8)
    assert len(calls) < 40
    assert simulated.host < 1.0


def test_the_clock_of_the_sleep_is_the_devices_own(simulated, warm):
    assert warm._cycles_a_second == pytest.approx(Simulated.clock_rate, rel=1e-3)
    assert warm.describe() == {"clock": "CUDA events; around a call of nothing they are 0.0 us apart"}


def test_cold_calls_are_preceded_by_the_flush_and_warm_ones_by_themselves(simulated, monkeypatch):
    done = []

    class Buffer:
        def sum(self):
            done.append("flush")
            simulated.enqueue(5e-6, 90e-6)

    monkeypatch.setattr(torch, "ones", lambda count, device: Buffer())
    for cold, before in ((True, ["flush", "call"]), (False, ["call", "call"])):
        clock = module("_timing_cuda").CudaClock(cold)
        watch = clock.watch(lambda: done.append("call"), 0.0)
        done.clear()
        watch.sample()
        assert done == before


def test_what_a_call_costs_the_host_is_timed_without_what_the_device_does(simulated, monkeypatch):
    clock = module("_device").Cuda().host_clock()
    times = module("_timing").interleaved(
        [lambda: simulated.enqueue(20e-6, 5e-3)], module("_timing").Effort(1.0, 3, 3), clock, [20e-6]
    )
    assert times[0].p50 == pytest.approx(20e-6, rel=1e-3)
    assert simulated.synchronised >= 6


def test_the_roofs_are_rates(simulated, monkeypatch):
    """1 GiB read in 0.5 ms; a copy in 1 ms; products of 8192 in 2 ms, with what torch returns replaced."""

    class Big:
        def sum(self):
            simulated.enqueue(5e-6, 0.5e-3)

        def copy_(self, other):
            simulated.enqueue(5e-6, 1e-3)

        def t(self):
            return self

    for name in ("rand", "randn", "empty_like"):
        monkeypatch.setattr(torch, name, lambda *args, **more: Big())
    monkeypatch.setattr(torch, "mm", lambda a, b: simulated.enqueue(5e-6, 2e-3))
    roofs = module("_roofs_cuda").measure(module("_timing_cuda").CudaClock(cold=False))
    assert roofs.copy_gbps == pytest.approx(2 * 2**30 / 1e-3 / 1e9, rel=1e-3)
    assert roofs.sum_gbps == pytest.approx(2**30 / 0.5e-3 / 1e9, rel=1e-3)
    assert list(roofs.product_tflops) == ["bfloat16", "float16", "float32"]
    assert list(roofs.product_tflops.values()) == pytest.approx([2 * 8192**3 / 2e-3 / 1e12] * 3, rel=1e-3)


def test_the_header_is_of_properties_that_torch_has(monkeypatch):
    stub = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    body = re.search(r"^class _CudaDeviceProperties:\n((?:    .*\n)+)", stub, re.MULTILINE)
    names = dict(re.findall(r"^    (\w+): (\w+)$", body[1], re.MULTILINE))
    properties = SimpleNamespace(
        **{n: "NVIDIA H200" if kind == "str" else 2**20 for n, kind in names.items()}
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: properties.name)
    device = module("_device").Cuda()
    about = device.describe()
    assert (about["machine"], about["device"], about["level"]) == ("NVIDIA H200", "cuda", "sm_90a")
    assert about["last-level cache"] == "1 MiB"
    assert device.name() == "nvidia-h200"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert device.level() == "sm_86"


def test_memory_is_the_allocators_peak_beside_what_was_there(monkeypatch):
    held = {"now": 1000, "peak": 99999}

    def call():
        held["peak"] = max(held["peak"], held["now"] + 250)

    def reset():
        held["peak"] = held["now"]

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["peak"])
    assert module("_device").Cuda().peak_growth(call) == 250


def test_a_device_with_an_error_that_stays_is_lost(monkeypatch):
    def fail():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert not module("_device").Cuda().usable()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert module("_device").Cuda().usable()


def test_a_layer_is_held_against_the_slower_of_moving_and_multiplying():
    roofs = module("_roofs_cuda").CudaRoofs(4000.0, 4000.0, {"bfloat16": 800.0, "float32": 50.0})
    moved, flops = 40_000_000, 2.0 * 4096 * 4096
    assert roofs.of_layer(1, moved, flops, "bfloat16", True) == ("copy", pytest.approx(10e-6))
    name, seconds = roofs.of_layer(4096, moved, 4096 * flops, "bfloat16", True)
    assert (name, seconds) == ("bfloat16 mm", pytest.approx(2 * 4096**3 / 800e12))
    assert roofs.of_layer(1, moved, 300 * flops, "float32", True)[0] == "float32 mm"
    assert roofs.of_quantize(32_000_000, 8_000_000, True) == ("copy", pytest.approx(10e-6))
