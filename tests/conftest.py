"""Fixtures that every test file shares."""

import devices
import pytest
import torch

from fastlora import isa as levels

LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")

# The levels with a quantise and a dequantise of their own; the higher ones take avx512's.
FORMAT_LEVELS = LEVELS[:3]
DEVICES = ("cuda_emulated", "cuda")
LINEAR_DEVICES = (*devices.EMULATED, "cuda")


@pytest.fixture(params=LEVELS)
def isa(request):
    """Each instruction-set level in turn, forced for the length of the test."""
    yield from _forced(request)


@pytest.fixture(params=LEVELS + LINEAR_DEVICES)
def linear_isa(request):
    """The levels, and the devices with what their kernels of the layer may be made to take."""
    if request.param in LINEAR_DEVICES:
        with devices.device(request.param):
            yield request.param
    else:
        yield from _forced(request)


@pytest.fixture(params=("cpu", *DEVICES))
def op_device(request):
    """The CPU, at whatever level it has, and the devices."""
    yield from _on(request)


@pytest.fixture(params=("cpu", *LINEAR_DEVICES))
def layer_device(request):
    """The same, and what the layer's kernels may be made to take: for what is built on the ops."""
    yield from _on(request)


@pytest.fixture(params=FORMAT_LEVELS + DEVICES)
def format_isa(request):
    """The same, over the levels that differ in the format's kernels, and over the devices that have them."""
    if request.param in DEVICES:
        with devices.device(request.param):
            yield request.param
    else:
        yield from _forced(request)


def _on(request):
    if request.param == "cpu":
        yield request.param
    else:
        with devices.device(request.param):
            yield request.param


def _forced(request):
    if request.param not in levels.available_isas():
        pytest.skip(f"this machine cannot run level {request.param}")
    with levels.use_isa(request.param):
        yield request.param


@pytest.fixture(params=FORMAT_LEVELS)
def format_level(request):
    """The levels alone, for what concerns the CPU only."""
    yield from _forced(request)


@pytest.fixture
def keep_threads():
    """Puts torch's thread count back after a test that changes it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
