"""The fused AdamW: torch's bits, the same at every level; 8-bit moments to the bit of the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor

from fastlora import ops_adamw, reference

op = torch.ops.fastlora
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 7, 16, 255, 256, 257, 4096, 40_003)
NUMBERS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def numbers(step: int, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999)) -> tuple:
    return lr, *betas, 1e-8, 0.1, step


def drawn(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moments(count: int) -> tuple[Tensor, Tensor]:
    return drawn(count, 2) * 0.1, drawn(count, 3).square() * 0.01


def float_step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, *args: float) -> Tensor:
    """adamw's float32 arithmetic in float64, rounded after each of its operations. m and v are written."""

    def rounded(t: Tensor) -> Tensor:
        return t.float().double()

    lr, beta1, beta2, eps, decay, step = args
    p, g, m64, v64 = p.float().double(), g.float().double(), m.double(), v.double()
    c = [torch.tensor(x, dtype=torch.float32).double() for x in (
        1 - lr * decay, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** 0.5, eps, -(lr / (1 - beta1**step))
    )]  # fmt: skip
    difference = rounded(g - m64)
    m64 = rounded(c[1] * difference + m64 if c[1] < 0.5 else rounded(c[1] - 1) * difference + g)
    v64 = rounded(rounded(c[3] * g) * g + rounded(v64 * c[2]))
    denominator = rounded(rounded(rounded(v64.sqrt()) / c[4]) + c[5])
    m.copy_(m64)
    v.copy_(v64)
    return (rounded(p * c[0]) + rounded(rounded(c[6] * m64) / denominator)).float()


@pytest.mark.parametrize(("dtype", "grad_dtype"), itertools.product(FLOATS, FLOATS), ids=str)
def test_bits_of_its_definition(format_isa: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    for count in SIZES:
        p, g, (m, v) = drawn(count, 0, dtype), drawn(count, 1, grad_dtype), moments(count)
        want_m, want_v = m.clone(), v.clone()
        want = float_step(p, g, want_m, want_v, *numbers(3))
        op.adamw(p, g, m, v, *numbers(3))
        # A sum in float64 is rounded twice by the emulation: at a tie of 2^-29 of all, the other way.
        for name, got, expected in (("m", m, want_m), ("v", v, want_v), ("param", p, want.to(dtype))):
            differ = (got != expected).sum().item()
            assert differ <= count // 10_000, f"{name}: {differ} of {count} differ"
            rtol = 2**-22 if got.dtype == torch.float32 else 2**-7
            torch.testing.assert_close(got, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("beta1", [0.9, 0.5, 0.3, 0.0])
def test_float64_meaning(format_isa: str, beta1: float) -> None:
    p, g, (m, v) = drawn(3000), drawn(3000, 1), moments(3000)
    want = reference.adamw(p, g, m, v, 1e-2, (beta1, 0.99), 1e-8, 0.1, 7)
    op.adamw(p, g, m, v, *numbers(7, betas=(beta1, 0.99)))
    for got, expected in zip((p, m, v), want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=1e-7)


def test_bits_of_torch_fused() -> None:
    """Of whole vectors: torch contracts otherwise in the elements that are left over."""
    if torch.backends.cpu.get_cpu_capability() not in {"AVX2", "AVX512"}:
        pytest.skip("torch has no FMA on this machine")
    theirs, ours, (m, v) = torch.nn.Parameter(drawn(1 << 14)), drawn(1 << 14), (torch.zeros(1 << 14),) * 2
    m, v = m.clone(), v.clone()
    optimizer = torch.optim.AdamW([theirs], **NUMBERS, fused=True)
    for step in range(1, 30):
        theirs.grad = drawn(1 << 14, step) * 10.0 ** (-step % 7)
        optimizer.step()
        op.adamw(ours, theirs.grad, m, v, *numbers(step))
    state = optimizer.state[theirs]
    assert_same_bits(m, state["exp_avg"], "exp_avg")
    assert_same_bits(v, state["exp_avg_sq"], "exp_avg_sq")
    assert_same_bits(ours, theirs.detach(), "param")


def test_close_to_torch_default() -> None:
    """Its for-loop takes a square root that is not always the nearest."""
    theirs, ours = torch.nn.Parameter(drawn(40_003)), drawn(40_003)
    m, v = torch.zeros(40_003), torch.zeros(40_003)
    optimizer = torch.optim.AdamW([theirs], **NUMBERS)
    for step in range(1, 30):
        theirs.grad = drawn(40_003, step)
        optimizer.step()
        op.adamw(ours, theirs.grad, m, v, *numbers(step))
    torch.testing.assert_close(ours, theirs.detach(), rtol=3e-7, atol=3e-8)


# --- 8 bits -----------------------------------------------------------------------------------------------


def test_maps() -> None:
    assert_same_bits(ops_adamw.unsigned_dynamic_map(), reference.unsigned_dynamic_map(), "the unsigned map")
    entries = reference.unsigned_dynamic_map()
    assert bool((entries.diff() > 0).all())
    assert entries[[0, 255]].tolist() == [0.0, 1.0]


def test_map_is_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    for signed, entries in ((True, reference.dynamic_map()), (False, reference.unsigned_dynamic_map())):
        theirs = functional.create_dynamic_map(signed=signed)
        torch.testing.assert_close(entries, theirs, rtol=2e-7, atol=0)


def hard_gradient(count: int, dtype: torch.dtype) -> Tensor:
    """Blocks of every scale, of zeros, with exact midpoints and with magnitudes far apart."""
    g = drawn(count, 5)
    g *= torch.logspace(-12, 2, -(-count // 64)).repeat_interleave(64)[:count]
    g[256:512] = 0
    entries = reference.dynamic_map()
    middle = ((entries[:-1].double() + entries[1:].double()) / 2).float()
    g[512:767] = middle[: max(0, min(255, count - 512))] if count > 767 else g[512:767]
    g[767:768] = 1.0
    g[1024:1280] *= 1e-25  # second moments below 1e-38
    return g.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 7, 255, 256, 257, 5000, 40_003])
def test_8bit_bits(format_isa: str, dtype: torch.dtype, count: int) -> None:
    """Moments decoded, a step in float32, moments encoded: the bits of the reference, step after step."""
    p, g = drawn(count, 0, dtype), hard_gradient(count, dtype)
    want = p.clone()
    blocks = -(-count // 256)
    codes, scales = torch.zeros(2, count, dtype=torch.uint8), torch.zeros(2, blocks)
    for step in range(1, 5):
        m = reference.decode_moment(codes[0], scales[0], True)
        v = reference.decode_moment(codes[1], scales[1], False)
        op.adamw(want, g, m, v, *numbers(step))
        want_m, scale_m = reference.encode_moment(m, True)
        want_v, scale_v = reference.encode_moment(v, False)
        op.adamw_8bit(p, g, *codes, *scales, *numbers(step))
        assert_same_bits(p, want, f"param of step {step}")
        assert_same_bits(scales, torch.stack((scale_m, scale_v)), f"scales of step {step}")
        assert_same_bits(codes, torch.stack((want_m, want_v)), f"codes of step {step}")
        g = g * (drawn(count, step) > 0) * 2


def test_8bit_second_moment_does_not_vanish() -> None:
    """One small gradient beside a large one, then none: a vanished second moment would divide by eps."""
    p, g = torch.zeros(256), torch.full((256,), 1e-6)
    g[0] = 1.0
    codes, scales = torch.zeros(2, 256, dtype=torch.uint8), torch.zeros(2, 1)
    op.adamw_8bit(p, g, *codes, *scales, *numbers(1))
    assert bool((codes[1] > 0).all())
    before = p.clone()
    op.adamw_8bit(p, torch.zeros(256), *codes, *scales, *numbers(2))
    assert (p - before).abs().max() <= 1e-2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_block(format_isa: str, bad: float) -> None:
    p, g = drawn(1000), drawn(1000, 1)
    g[300] = bad
    codes, scales = torch.zeros(2, 1000, dtype=torch.uint8), torch.zeros(2, 4)
    for step in (1, 2):
        op.adamw_8bit(p, g, *codes, *scales, *numbers(step))
    finite = torch.isfinite(p)
    assert not finite[300]
    assert bool(finite[:256].all())
    assert bool(finite[512:].all())
    assert torch.isfinite(scales).tolist() == [[True, False, True, True]] * 2


@pytest.mark.parametrize("eight", [False, True])
def test_threads_do_not_matter(eight: bool, keep_threads: None) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        p, g = drawn(100_003), drawn(100_003, 1)
        states: tuple[Tensor, ...] = moments(100_003)
        if eight:
            states = (*torch.zeros(2, 100_003, dtype=torch.uint8), *torch.zeros(2, 391))
        (op.adamw_8bit if eight else op.adamw)(p, g, *states, *numbers(1))
        results.append((p, *states))
    for others in results[1:]:
        for got, want in zip(others, results[0], strict=True):
            assert_same_bits(got, want, "another number of threads")


# --- the ops' contract ------------------------------------------------------------------------------------


def arguments(eight: bool) -> dict:
    p, g = drawn(300).reshape(3, 100), drawn(300, 1, torch.bfloat16).reshape(3, 100)
    names = ("lr", "beta1", "beta2", "eps", "weight_decay", "step")
    states: dict = {"exp_avg": torch.zeros(3, 100), "exp_avg_sq": torch.zeros(3, 100)}
    if eight:
        states = {name: torch.zeros(3, 100, dtype=torch.uint8) for name in states}
        states |= {f"{name}_scale": torch.zeros(2) for name in states}
    return {"param": p, "grad": g} | states | dict(zip(names, numbers(1), strict=True))


@pytest.mark.parametrize("eight", [False, True])
def test_opcheck(eight: bool) -> None:
    function = op.adamw_8bit if eight else op.adamw
    torch.library.opcheck(function.default, tuple(arguments(eight).values()))


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"param": torch.zeros(3, 100, dtype=torch.float64)}, TypeError, "expected param in float32, bf"),
        ({"grad": torch.zeros(3, 100, dtype=torch.int32)}, TypeError, "expected grad in float32, bf"),
        ({"grad": torch.zeros(100, 3)}, ValueError, r"expected grad of shape \(3, 100\) \(param's\)"),
        ({"param": torch.zeros(100, 3).t()}, ValueError, "expected param contiguous"),
        ({"exp_avg": torch.zeros(300)}, (TypeError, ValueError), "expected exp_avg"),
        ({"exp_avg_sq": torch.zeros(3, 100, dtype=torch.float16)}, TypeError, "expected exp_avg_sq in torch"),
        ({"step": 0}, ValueError, "expected step from 1, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_errors(eight: bool, change: dict, error: type[Exception], message: str) -> None:
    name = "adamw_8bit" if eight else "adamw"
    args = arguments(eight) | change
    before = args["param"].clone()
    with pytest.raises(error, match=f"^{name}: {message}"):
        getattr(op, name)(*args.values())
    assert torch.equal(args["param"], before)


def test_errors_of_scales() -> None:
    args = arguments(True) | {"exp_avg_scale": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"^adamw_8bit: expected exp_avg_scale of shape \(2,\)"):
        op.adamw_8bit(*args.values())
    args = arguments(True) | {"exp_avg_sq_scale": torch.zeros(2, dtype=torch.float16)}
    with pytest.raises(TypeError, match=r"^adamw_8bit: expected exp_avg_sq_scale in torch.float32"):
        op.adamw_8bit(*args.values())
