"""What goes wrong in bitsandbytes 0.50.2 on a CPU, each fault shown on its own code, and right once patched.

A fault that ends the process is shown in another one.
"""

import subprocess
import sys

import pytest
import torch
from needs import patches_bitsandbytes
from tolerances import relative_error

import fastlora
from fastlora import reference

pytestmark = patches_bitsandbytes
bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
F = bnb.functional
REPACKS = F.has_avx512bf16()
needs_repacking = pytest.mark.skipif(not REPACKS, reason="bitsandbytes repacks where AVX512-BF16 is")
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
BF16 = torch.bfloat16
ROUNDING = 5e-3  # of a product in bfloat16


@pytest.fixture(autouse=True)
def unpatched():
    fastlora.unpatch_bitsandbytes()
    yield
    fastlora.unpatch_bitsandbytes()


def layer(n, k, **options):
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(k, n, False, BF16, quant_type="nf4", **options)
    return made.to("cpu")


def dense(made):
    """Its weight by definition, float64."""
    state = made.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = F.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = reference.nf4_unpack(made.weight.data.reshape(-1), state.shape.numel())
    return reference.nf4_dequantize(codes, absmax, state.blocksize, torch.float32).view(state.shape).double()


def product_error(made, x):
    """Of a call without gradients, against float64."""
    want = x.double() @ dense(made).T
    with torch.no_grad():
        return relative_error(made(x), want)


@needs_repacking
@pytest.mark.parametrize(
    ("n", "k", "error", "message"),
    [
        (1152, 4304, RuntimeError, r"shape '\[1152, 67\]' is invalid for input of size 77472"),
        (4304, 1152, AssertionError, "N must be divisible by block_n"),
        (100, 128, AssertionError, "N must be divisible by block_n"),
        (64, 96, RuntimeError, r"shape '\[64, 1\]' is invalid"),
        (64, 123, AssertionError, "K must be even"),
    ],
)
def test_evaluation_of_sizes_that_do_not_divide(n, k, error, message):
    made, x = layer(n, k).eval(), torch.randn(3, k, dtype=BF16)
    with torch.no_grad(), pytest.raises(error, match=message):
        made(x)
    fastlora.patch_bitsandbytes()
    assert product_error(layer(n, k).eval(), x) < ROUNDING


@needs_repacking
def test_evaluation_changes_the_weight():
    def evaluated():
        made, x = layer(64, 128).eval(), torch.randn(3, 128, dtype=BF16)
        before = made.weight.data.clone()
        with torch.no_grad():
            made(x)
        return before, made.weight.data

    before, after = evaluated()
    assert after.shape != before.shape
    fastlora.patch_bitsandbytes()
    assert torch.equal(*evaluated())


@needs_repacking
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered")
def test_training_after_evaluation_has_no_gradient():
    def gradient():
        made, x = layer(64, 128), torch.randn(3, 128, dtype=BF16)
        weight = dense(made)
        with torch.no_grad():
            made.eval()(x)
        x.requires_grad_()
        made.train()(x).sum().backward()
        return x.grad, weight.sum(0).expand(3, 128)

    assert gradient()[0] is None
    fastlora.patch_bitsandbytes()
    assert relative_error(*gradient()) < ROUNDING


@needs_repacking
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_saving_after_evaluation_saves_other_scales(nested):
    def saved():
        made = layer(64, 128, compress_statistics=nested)
        before = {name: t.clone() for name, t in made.state_dict().items()}
        with torch.no_grad():
            made.eval()(torch.randn(3, 128, dtype=BF16))
        after = made.state_dict()
        return [name for name in before if not torch.equal(before[name], after[name])]

    assert "weight.absmax" in saved()
    fastlora.patch_bitsandbytes()
    assert saved() == []


@needs_repacking
@pytest.mark.parametrize(
    "make", [lambda: torch.randn(128, 5, dtype=BF16).t(), lambda: torch.randn(5, 256, dtype=BF16)[:, ::2]]
)
def test_evaluation_of_an_x_with_strides_is_wrong(make):
    def error():
        made, x = layer(64, 128).eval(), make()
        want = x.double() @ dense(made).T
        with torch.no_grad():
            return relative_error(made(x), want)

    assert error() > 0.5
    fastlora.patch_bitsandbytes()
    assert error() < ROUNDING


@needs_repacking
def test_evaluation_in_float32_is_bfloat16s():
    torch.manual_seed(0)

    def error():
        made, x = bnb.nn.Linear4bit(128, 64, False, quant_type="nf4").to("cpu").eval(), torch.randn(3, 128)
        want = x.double() @ dense(made).T
        with torch.no_grad():
            return relative_error(made(x), want)

    assert error() > 1e-3
    fastlora.patch_bitsandbytes()
    assert error() < 1e-6


_EMPTY = """
import bitsandbytes as bnb, torch
layer = bnb.nn.Linear4bit(128, 64, False, torch.bfloat16, quant_type="nf4").to("cpu").eval()
with torch.no_grad():
    print("rows:", layer(torch.empty(0, 128, dtype=torch.bfloat16)).shape[0])
"""


@needs_repacking
def test_evaluation_of_an_empty_batch_ends_the_process():
    done = subprocess.run([sys.executable, "-c", _EMPTY], capture_output=True, check=False)
    assert done.returncode < 0  # a signal
    fastlora.patch_bitsandbytes()
    made = layer(64, 128).eval()
    with torch.no_grad():
        assert made(torch.empty(0, 128, dtype=BF16)).shape == (0, 64)


@needs_repacking
def test_gemv_of_a_weight_in_its_own_layout_is_wrong():
    made, x = layer(64, 128), torch.randn(1, 128, dtype=BF16)
    want = x.double() @ dense(made).T

    def error():
        return relative_error(F.gemv_4bit(x, made.weight.data, state=made.weight.quant_state), want)

    assert error() > 0.5
    fastlora.patch_bitsandbytes()
    assert error() < ROUNDING


@needs_repacking
def test_gemv_of_a_repacked_weight():
    made, x = layer(64, 128), torch.randn(3, 128, dtype=BF16)
    want = x.double() @ dense(made).T
    with torch.no_grad():
        made.eval()(x)
    strided = x.t().contiguous().t()
    assert relative_error(F.gemv_4bit(strided, made.weight.data, state=made.weight.quant_state), want) > 0.5
    fastlora.patch_bitsandbytes()
    for one in (x, strided):
        got = F.gemv_4bit(one, made.weight.data, state=made.weight.quant_state)
        assert relative_error(got, want) < ROUNDING
    got = F.gemv_4bit(x[:0], made.weight.data, state=made.weight.quant_state)
    assert got.shape == (0, 64)


@pytest.mark.skipif(not AVX512, reason="the fault is in bitsandbytes' AVX-512 kernel")
def test_dequantising_rows_that_are_no_whole_blocks_is_wrong():
    weight = torch.randn(8, 4304)
    data, state = F.quantize_4bit(weight, quant_type="nf4")
    codes = reference.nf4_unpack(data.view(-1), weight.numel())
    want = reference.nf4_dequantize(codes, state.absmax, 64, torch.float32).view(8, 4304)
    wrong = F.dequantize_4bit(data, state)
    assert relative_error(wrong, want) > 0.01
    fastlora.patch_bitsandbytes()
    assert torch.equal(F.dequantize_4bit(data, state), want)


@pytest.mark.skipif(not AVX512, reason="the fault is in bitsandbytes' AVX-512 kernel")
def test_training_over_such_rows_is_wrong():
    made, x = layer(64, 4304), torch.randn(3, 4304, dtype=BF16, requires_grad=True)
    weight = dense(made)

    def errors():
        y = made(x)
        dx = torch.autograd.grad(y.sum(), x)[0]
        return (
            relative_error(y.detach(), x.detach().double() @ weight.T),
            relative_error(dx, weight.sum(0).expand(3, -1)),
        )

    assert min(errors()) > 0.01
    fastlora.patch_bitsandbytes()
    assert max(errors()) < ROUNDING


def test_dequantising_into_memory_given():
    data, state = F.quantize_4bit(torch.randn(64, 64), quant_type="nf4")
    out = torch.empty(64, 64)
    with pytest.raises(NotImplementedError, match="dequantize_4bit"):
        F.dequantize_4bit(data, state, out=out)
    fastlora.patch_bitsandbytes()
    F.dequantize_4bit(data, state, out=out)
    assert torch.equal(out, F.dequantize_4bit(data, state))


def test_a_forward_casts_the_bias_itself():
    def bias_after():
        made = bnb.nn.Linear4bit(64, 64, True, BF16, quant_type="nf4").to("cpu")
        made(torch.randn(3, 64))
        return made.bias.dtype

    assert bias_after() == BF16
    fastlora.patch_bitsandbytes()
    assert bias_after() == torch.float32


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemm_4bit. an autograd kernel was not registered")
def test_a_compiled_gemm_has_no_gradient():
    """Not compiled it has one by accident, through the torch function that its kernel calls."""

    def gradient():
        made = layer(64, 128, compress_statistics=False)
        state, x = made.weight.quant_state, torch.randn(3, 128, requires_grad=True)

        @torch.compile(backend="aot_eager", fullgraph=True)
        def product(x):
            args = (x, made.weight.data, state.shape, state.absmax, 64, "nf4")
            return torch.ops.bitsandbytes.gemm_4bit.default(*args)

        return torch.autograd.grad(product(x).sum(), x)[0], dense(made).sum(0).expand(3, 128)

    with pytest.raises(RuntimeError, match=r"does not require grad|not have been used"):
        gradient()
    fastlora.patch_bitsandbytes()
    assert relative_error(*gradient()) < 1e-6
