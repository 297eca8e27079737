"""The emulator of CUDA kernels, and the kernels in it, by the C++ tests that `make sanitize` runs too."""

import pytest
import torch
from devices import EmulatedDevice

import fastlora
from fastlora import ops

emulator = pytest.importorskip("fastlora._emulator", reason="this build holds no emulator")


def test_collectives_planted_bugs_and_counters(capfd):
    assert emulator.self_test(), capfd.readouterr().err


def test_kernels_against_those_of_the_cpu(capfd):
    assert emulator.kernel_test(), capfd.readouterr().err


def test_kernels_of_many_adapters_and_what_they_cost_in_banks_and_sectors(capfd):
    assert emulator.segmented_test(), capfd.readouterr().err


def test_a_fault_is_an_error_that_names_the_place():
    """A weight one element shorter than it says: the kernel reads past its end."""

    class Liar(EmulatedDevice):
        def call(self, kernel, inputs, outputs, *numbers):
            return super().call(kernel, (inputs[0][:-1], *inputs[1:]), outputs, *numbers)

    where = r"nf4_quantize\.cu:\d+: kernel .*quantize.*, block .* thread 15"
    what = "reads 16 bytes at offset 240 of global buffer input 0, which has 252"
    with pytest.raises(RuntimeError, match=f"{where} {what}"):
        ops.CUDA_OPS["nf4_quantize"](Liar(seed=3), torch.randn(64), 64, False, True)


def test_a_capture_needs_the_check_turned_off():
    class Capturing(EmulatedDevice):
        def capturing(self):
            return True

    weight = torch.randn(4, 64)
    with pytest.raises(RuntimeError, match="expected check_finite=False while a CUDA graph is captured"):
        ops.CUDA_OPS["nf4_quantize"](Capturing(seed=1), weight, 64, True, True)
    packed, scales, nested = ops.CUDA_OPS["nf4_quantize"](Capturing(seed=1), weight, 64, True, False)
    assert fastlora.NF4Weight(packed, scales, nested, weight.shape, weight.dtype) == fastlora.quantize_nf4(
        weight
    )


def test_without_the_check_a_bad_weight_passes():
    weight = torch.randn(4, 64)
    weight[1, 1] = float("nan")
    q = fastlora.quantize_nf4(weight, check_finite=False, double_quant=False)
    assert q.packed.shape == (4, 32)
