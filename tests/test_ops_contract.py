"""What holds for every op: schemas, fakes and registrations (opcheck), an error for every bad input, and the
choice of the instruction-set level."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from experts_contract import EXPERTS_ARGS, EXPERTS_ERRORS
from linear_cases import FLOATS, Case, make_inputs, make_weight
from segmented_contract import SEGMENTED_ARGS, SEGMENTED_ERRORS
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastlora import isa as levels

op = torch.ops.fastlora
M, N, K, R = 3, 33, 70, 4


def linear_args(case: Case | None = None) -> dict:
    """Arguments of nf4_linear by name, in order."""
    inputs = make_inputs(case or Case(M, N, K, R, 64, torch.bfloat16))
    names = (
        "x",
        "packed",
        "scales",
        "nested",
        "blocksize",
        "bias",
        "lora_a",
        "lora_b",
        "scaling",
        "offsets",
        "gain",
    )
    return dict(zip(names, inputs.linear, strict=True))


def given_u_args() -> dict:
    args = linear_args()
    u = torch.ones(M, R, dtype=torch.bfloat16)
    names = ("packed", "scales", "nested", "blocksize", "bias", "lora_b", "scaling", "offsets")
    return {"x": args["x"], "u": u} | {name: args[name] for name in names}


def grad_input_args(case: Case | None = None) -> dict:
    inputs = make_inputs(case or Case(M, N, K, R, 64, torch.bfloat16))
    names = (
        "dy",
        "packed",
        "scales",
        "nested",
        "in_features",
        "blocksize",
        "lora_a",
        "lora_b",
        "scaling",
        "offsets",
    )
    return dict(zip(names, inputs.grad_input, strict=True))


def backward_args() -> dict:
    args = grad_input_args()
    u = torch.randn(M, R).to(torch.bfloat16)
    return {"dy": args.pop("dy"), "u": u} | args


def grad_b_args() -> dict:
    args = backward_args()
    return {name: args[name] for name in ("dy", "u", "lora_b", "scaling")}


def grad_a_args() -> dict:
    v = torch.randn(M, R).to(torch.bfloat16)
    return {"v": v, "x": linear_args()["x"], "dtype": torch.float32}


def quantize_args() -> dict:
    return {"weight": torch.randn(5, 123), "blocksize": 64, "double_quant": True, "check_finite": True}


def dequantize_args() -> dict:
    w = make_weight(5, 123)
    return {
        "packed": w.packed, "scales": w.scales, "nested": w.nested, "cols": 123, "blocksize": 64,
        "dtype": torch.float16, "offsets": w.offsets,
    }  # fmt: skip


def decode_absmax_args() -> dict:
    w = make_weight(5, 123)
    return {"scales": w.scales, "nested": w.nested}


def dropout_args() -> dict:
    return {"x": torch.randn(5, 7), "seed": torch.tensor(3), "p": 0.25}


ADAMW_NUMBERS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 3}


def adamw_args() -> dict:
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    return {name: torch.rand(5, 123) for name in names} | ADAMW_NUMBERS


def adamw_8bit_args() -> dict:
    codes = {name: torch.full((5, 123), 200, dtype=torch.uint8) for name in ("exp_avg", "exp_avg_sq")}
    scales = {name: torch.rand(3) for name in ("exp_avg_scale", "exp_avg_sq_scale")}
    return {"param": torch.rand(5, 123), "grad": torch.rand(5, 123)} | codes | scales | ADAMW_NUMBERS


ARGS = {
    "adamw": adamw_args,
    "adamw_8bit": adamw_8bit_args,
    "nf4_quantize": quantize_args,
    "nf4_dequantize": dequantize_args,
    "nf4_decode_absmax": decode_absmax_args,
    "nf4_linear": linear_args,
    "nf4_linear_with_u": linear_args,
    "nf4_linear_given_u": given_u_args,
    "nf4_linear_grad_input": grad_input_args,
    "nf4_linear_backward": backward_args,
    "lora_grad_a": grad_a_args,
    "lora_grad_b": grad_b_args,
    "lora_dropout": dropout_args,
    **SEGMENTED_ARGS,
    **EXPERTS_ARGS,
}


def call(name: str, **changes: object) -> object:
    args = ARGS[name]() | changes
    return getattr(op, name)(*args.values())


# --- opcheck --------------------------------------------------------------------------------------------


def test_every_op_is_covered() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastlora::")}
    assert registered == {f"fastlora::{name}" for name in ARGS}


@pytest.mark.parametrize("name", ARGS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(op, name).default, tuple(ARGS[name]().values()))


@pytest.mark.parametrize("name", ["nf4_linear_with_u", "nf4_linear_grad_input"])
def test_opcheck_without_the_optional_parts(name: str) -> None:
    case = Case(M, N, K, 0, 64, torch.float32, double_quant=False, bias=False)
    args = grad_input_args(case) if name == "nf4_linear_grad_input" else linear_args(case)
    torch.library.opcheck(getattr(op, name).default, tuple(args.values()))


@pytest.mark.parametrize("name", ["nf4_dequantize", "nf4_linear_with_u", "nf4_linear_backward"])
def test_opcheck_with_offsets(name: str) -> None:
    offsets = make_weight(
        5 if name == "nf4_dequantize" else N, 123 if name == "nf4_dequantize" else K, offsets=True
    )
    args = ARGS[name]() | {"offsets": offsets.offsets}
    torch.library.opcheck(getattr(op, name).default, tuple(args.values()))


@pytest.mark.parametrize("name", ARGS)
def test_meta_tensors_give_the_shapes_of_real_ones(name: str) -> None:
    args = ARGS[name]()
    real = getattr(op, name)(*args.values())

    def on_meta(value: object) -> object:
        if isinstance(value, list):
            return [on_meta(v) for v in value]
        return value.to("meta") if isinstance(value, Tensor) else value

    fake = getattr(op, name)(*map(on_meta, args.values()))
    real, fake = ([t for t in tree_leaves(out) if t is not None] for out in (real, fake))
    for have, want in zip(fake, real, strict=True):
        assert (have.device.type, have.shape, have.dtype, have.stride()) == (
            "meta", want.shape, want.dtype, want.stride(),
        )  # fmt: skip


# --- bad inputs --------------------------------------------------------------------------------------------

x = torch.zeros(M, K, dtype=torch.bfloat16)
half = torch.float16
WEIGHT_ERRORS = [
    ({"packed": torch.zeros(N, 35, dtype=torch.int8)}, TypeError, "expected packed in uint8, got torch.int8"),
    ({"scales": torch.zeros(37)}, TypeError, "expected scales in uint8, got torch.float32"),
    ({"nested": torch.zeros(2)}, TypeError, "expected nested in uint8, got torch.float32"),
    ({"scales": torch.zeros(36, dtype=torch.uint8)}, ValueError,
     "expected scales of shape (37,) (37 blocks, one byte each), got (36,)"),
    ({"nested": None}, ValueError, "expected scales of shape (148,) (37 blocks, 4 bytes each), got (37,)"),
    ({"nested": torch.zeros(4, dtype=torch.uint8)}, ValueError,
     "expected nested of shape (8,) (an offset and 1 scales of 4 bytes), got (4,)"),
    ({"blocksize": 48}, ValueError,
     "expected blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096), got 48"),
    ({"blocksize": 128}, ValueError, "expected scales of shape (19,) (19 blocks, one byte each), got (37,)"),
    ({"offsets": torch.zeros(N, 5)}, TypeError, "expected offsets in uint8, got torch.float32"),
    ({"offsets": torch.zeros(N, 12, dtype=torch.uint8)}, ValueError,
     "expected offsets of shape (33, 4 * groups), groups a divisor of 70 columns, got (33, 12)"),
    ({"offsets": torch.zeros(N, 6, dtype=torch.uint8)}, ValueError,
     "expected offsets of shape (33, 4 * groups), groups a divisor of 70 columns, got (33, 6)"),
    ({"offsets": torch.zeros(32, 8, dtype=torch.uint8)}, ValueError,
     "expected offsets of shape (33, 4 * groups), groups a divisor of 70 columns, got (32, 8)"),
    ({"offsets": torch.zeros(N, 0, dtype=torch.uint8)}, ValueError,
     "expected offsets of shape (33, 4 * groups), groups a divisor of 70 columns, got (33, 0)"),
    ({"scales": torch.zeros(37, dtype=torch.uint8, device="meta")}, RuntimeError,
     "expected scales on cpu, got meta"),
    ({"nested": torch.zeros(8, dtype=torch.uint8, device="meta")}, RuntimeError,
     "expected nested on cpu, got meta"),
]  # fmt: skip
LORA_ERRORS = [
    ({"lora_a": None}, ValueError, "expected lora_a and lora_b together, got only one of them"),
    ({"lora_b": None}, ValueError, "expected lora_a and lora_b together, got only one of them"),
    ({"lora_a": torch.zeros(R, K - 1)}, ValueError, "expected lora_a of shape (r, 70), got (4, 69)"),
    ({"lora_a": torch.zeros(K)}, ValueError, "expected lora_a of shape (r, 70), got (70,)"),
    ({"lora_a": torch.zeros(R + 1, K)}, ValueError,
     "expected lora_b of shape (33, 5) (33 out_features, rank 5), got (33, 4)"),
    ({"lora_b": torch.zeros(N + 1, R)}, ValueError,
     "expected lora_b of shape (33, 4) (33 out_features, rank 4), got (34, 4)"),
    ({"lora_b": torch.zeros(R)}, ValueError,
     "expected lora_b of shape (33, 4) (33 out_features, rank 4), got (4,)"),
    ({"lora_a": torch.zeros(R, K, dtype=torch.float64)}, TypeError,
     "expected lora_a in float32, bfloat16 or float16, got torch.float64"),
    ({"lora_b": torch.zeros(N, R, dtype=half)}, TypeError,
     "expected lora_b in lora_a's dtype torch.float32, got torch.float16"),
    ({"lora_a": torch.zeros(R, K, device="meta")}, RuntimeError, "expected lora_a on cpu, got meta"),
    ({"lora_b": torch.zeros(N, R, device="meta")}, RuntimeError, "expected lora_b on cpu, got meta"),
]  # fmt: skip
GAIN_ERRORS = [
    ({"gain": torch.zeros(N, dtype=half)}, TypeError, "expected gain in float32, got torch.float16"),
    ({"gain": torch.zeros(N + 1)}, ValueError, "expected gain of shape (33,) (out_features), got (34,)"),
    ({"gain": torch.zeros(N, device="meta")}, RuntimeError, "expected gain on cpu, got meta"),
]  # fmt: skip
BIAS_ERRORS = [
    ({"bias": torch.zeros(N)}, TypeError, "expected bias in x's dtype torch.bfloat16, got torch.float32"),
    ({"bias": torch.zeros(N + 1, dtype=x.dtype)}, ValueError,
     "expected bias of shape (33,) (out_features), got (34,)"),
    ({"bias": torch.zeros(1, N, dtype=x.dtype)}, ValueError,
     "expected bias of shape (33,) (out_features), got (1, 33)"),
    ({"bias": torch.zeros(N, dtype=x.dtype, device="meta")}, RuntimeError, "expected bias on cpu, got meta"),
]  # fmt: skip
X_ERRORS = [
    ({"x": x.double()}, TypeError, "expected x in float32, bfloat16 or float16, got torch.float64"),
    ({"x": x.int()}, TypeError, "expected x in float32, bfloat16 or float16, got torch.int32"),
    ({"x": torch.tensor(1.0)}, ValueError,
     "expected x of shape (..., in_features), got a 0-dimensional tensor"),
    ({"x": x[:, :68]}, ValueError,
     "expected x of shape (..., k) with ceil(k / 2) = 35 to match packed (33, 35), got (3, 68)"),
    ({"packed": torch.zeros(N * 35, dtype=torch.uint8)}, ValueError,
     "expected packed of shape (n, ceil(k / 2)), got (1155,)"),
    ({"packed": torch.zeros(N + 1, 35, dtype=torch.uint8)}, ValueError,
     "expected scales of shape (38,) (38 blocks, one byte each), got (37,)"),
    ({"packed": torch.zeros(N, 35, dtype=torch.uint8, device="meta")}, RuntimeError,
     "expected packed on cpu, got meta"),
    ({"x": x.to("meta")}, RuntimeError, "expected packed on meta, got cpu"),
]  # fmt: skip
u = torch.zeros(M, R, dtype=x.dtype)
U_ERRORS = [
    ({"u": u.float()}, TypeError, "expected u in x's dtype torch.bfloat16, got torch.float32"),
    ({"u": u[:2]}, ValueError, "expected u of shape (3, 4) (x's rows, rank), got (2, 4)"),
    ({"u": u[0]}, ValueError, "expected u of shape (3, 4) (x's rows, rank), got (4,)"),
    ({"u": u[0, 0]}, ValueError, "expected u of shape (..., rank), got a 0-dimensional tensor"),
    ({"u": u[:, :3]}, ValueError, "expected lora_b of shape (33, 3) (33 out_features, rank 3), got (33, 4)"),
    ({"u": u.to("meta")}, RuntimeError, "expected u on cpu, got meta"),
    ({"lora_b": torch.zeros(N, R, dtype=torch.int32)}, TypeError,
     "expected lora_b in float32, bfloat16 or float16, got torch.int32"),
    ({"lora_b": torch.zeros(N, R, device="meta")}, RuntimeError, "expected lora_b on cpu, got meta"),
]  # fmt: skip
dy = torch.zeros(M, N, dtype=x.dtype)
DY_ERRORS = [
    ({"dy": dy.double()}, TypeError, "expected dy in float32, bfloat16 or float16, got torch.float64"),
    ({"dy": dy[:, :32]}, ValueError,
     "expected dy of shape (..., 33) to match the weight's out_features, got (3, 32)"),
    ({"dy": dy[0, 0]}, ValueError,
     "expected dy of shape (..., 33) to match the weight's out_features, got ()"),
    ({"in_features": 68}, ValueError,
     "expected packed of shape (33, 34) (a weight of 33 x 68), got (33, 35)"),
    ({"packed": torch.zeros(N * 35, dtype=torch.uint8)}, ValueError,
     "expected packed of shape (n, ceil(k / 2)), got (1155,)"),
    ({"packed": torch.zeros(N, 35, dtype=torch.uint8, device="meta")}, RuntimeError,
     "expected packed on cpu, got meta"),
]  # fmt: skip
NARROW_U_ERRORS = [
    ({"u": u.float()}, TypeError, "expected u in dy's dtype torch.bfloat16, got torch.float32"),
    ({"u": u[:2]}, ValueError, "expected u of shape (3, 4) (dy's rows, rank), got (2, 4)"),
    ({"u": u[0, 0]}, ValueError, "expected u of shape (..., rank), got a 0-dimensional tensor"),
    ({"u": u.to("meta")}, RuntimeError, "expected u on cpu, got meta"),
]  # fmt: skip
NO_ADAPTER_IS_NO_CASE = [bad for bad in LORA_ERRORS if None not in bad[0].values()]
BACKWARD_ERRORS = [
    *NARROW_U_ERRORS,
    ({"u": u[:, :3]}, ValueError, "expected u of shape (3, 4) (dy's rows, rank), got (3, 3)"),
]
GRAD_B_ERRORS = [
    *NARROW_U_ERRORS,
    ({"dy": dy.double()}, TypeError, "expected dy in float32, bfloat16 or float16, got torch.float64"),
    ({"dy": dy[0, 0]}, ValueError,
     "expected dy of shape (..., out_features), got a 0-dimensional tensor"),
    ({"u": u[:, :3]}, ValueError, "expected lora_b of shape (33, 3) (33 out_features, rank 3), got (33, 4)"),
    ({"lora_b": torch.zeros(N, R, dtype=torch.int32)}, TypeError,
     "expected lora_b in float32, bfloat16 or float16, got torch.int32"),
    ({"lora_b": torch.zeros(N, R, device="meta")}, RuntimeError, "expected lora_b on cpu, got meta"),
]  # fmt: skip
GRAD_A_ERRORS = [
    ({"x": x.double()}, TypeError, "expected x in float32, bfloat16 or float16, got torch.float64"),
    ({"x": x[0, 0]}, ValueError, "expected x of shape (..., in_features), got a 0-dimensional tensor"),
    ({"v": u.float()}, TypeError, "expected v in x's dtype torch.bfloat16, got torch.float32"),
    ({"v": u[:2]}, ValueError, "expected v of shape (3, 4) (x's rows, rank), got (2, 4)"),
    ({"v": u.to("meta")}, RuntimeError, "expected v on cpu, got meta"),
    ({"dtype": torch.int32}, TypeError, "expected dtype float32, bfloat16 or float16, got torch.int32"),
]  # fmt: skip
DROPOUT_ERRORS = [
    ({"x": torch.zeros(3, dtype=torch.int64)}, TypeError,
     "expected x in float32, bfloat16 or float16, got torch.int64"),
    ({"seed": torch.tensor(1.0)}, TypeError, "expected seed as one int64, got torch.float32 of shape ()"),
    ({"seed": torch.tensor([1, 2])}, TypeError, "expected seed as one int64, got torch.int64 of shape (2,)"),
    ({"seed": torch.tensor(1, device="meta")}, RuntimeError, "expected seed on cpu, got meta"),
    ({"p": 1.0}, ValueError, "expected p in [0, 1), got 1.0"),
    ({"p": -0.5}, ValueError, "expected p in [0, 1), got -0.5"),
    ({"p": float("nan")}, ValueError, "expected p in [0, 1), got nan"),
]  # fmt: skip

BAD_INPUTS = [
    (name, *bad)
    for names, table in (
        (
            ("nf4_linear", "nf4_linear_with_u"),
            X_ERRORS + WEIGHT_ERRORS + BIAS_ERRORS + GAIN_ERRORS + LORA_ERRORS,
        ),
        (("nf4_linear_given_u",), X_ERRORS + WEIGHT_ERRORS + BIAS_ERRORS + U_ERRORS),
        (("nf4_linear_grad_input",), DY_ERRORS + WEIGHT_ERRORS + LORA_ERRORS),
        (("nf4_linear_backward",), DY_ERRORS + WEIGHT_ERRORS + NO_ADAPTER_IS_NO_CASE + BACKWARD_ERRORS),
        (("lora_grad_a",), GRAD_A_ERRORS),
        (("lora_grad_b",), GRAD_B_ERRORS),
        (("lora_dropout",), DROPOUT_ERRORS),
        *((names, errors) for names, errors in (*SEGMENTED_ERRORS, *EXPERTS_ERRORS)),
    )
    for name in names
    for bad in table
]


@pytest.mark.parametrize(("name", "changes", "kind", "message"), BAD_INPUTS)
def test_bad_input_is_named(name: str, changes: dict, kind: type[Exception], message: str) -> None:
    # nf4_linear and nf4_linear_with_u are one op with and without u, and speak with one name.
    prefix = name.removesuffix("_with_u")
    with pytest.raises(kind, match=rf"^{prefix}: {re.escape(message)}$"):
        call(name, **changes)


@pytest.mark.parametrize("name", ARGS)
def test_freed_storage_is_an_error(name: str) -> None:
    args = ARGS[name]()
    first = next(iter(args))
    freed = args[first].clone()
    freed.untyped_storage().resize_(0)
    message = (
        f"{name}: expected tensors with data, got one of shape {tuple(freed.shape)} whose storage was freed"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        call(name, **{first: freed})


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_rank_of_zero_is_no_adapter(dtype: torch.dtype) -> None:
    args = linear_args(Case(M, N, K, 0, 64, dtype))
    y, u = op.nf4_linear_with_u(*args.values())
    args |= {"lora_a": torch.empty(0, K), "lora_b": torch.empty(N, 0)}
    again, u_again = op.nf4_linear_with_u(*args.values())
    assert torch.equal(again, y)
    assert u.shape == u_again.shape == (M, 0)


# --- levels ------------------------------------------------------------------------------------------------


def test_levels_have_names() -> None:
    assert tuple(levels.LEVELS) == ("scalar", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")
    assert levels.available_isas()[0] == "scalar"
    assert levels.current_isa() in levels.available_isas()
    assert levels.current_isa() != "amx_emulated" or os.environ.get("FASTLORA_ISA") == "amx_emulated"


def test_use_isa_forces_a_level_and_puts_the_old_one_back() -> None:
    before = levels.current_isa()

    def fail() -> None:
        assert levels.current_isa() == "scalar"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), levels.use_isa("scalar"):
        fail()
    assert levels.current_isa() == before


def test_unknown_level() -> None:
    message = "isa: expected one of scalar, avx2, avx512, avx512_bf16, amx, amx_emulated, got 'sse9'"
    with pytest.raises(ValueError, match=f"^{message}$"), levels.use_isa("sse9"):
        pass


@pytest.fixture(scope="module")
def missing_level() -> str:
    missing = [name for name in levels.LEVELS if name not in levels.available_isas()]
    if not missing:
        pytest.skip("this machine has every level")
    return missing[0]


def test_a_level_the_machine_lacks(missing_level: str) -> None:
    with (
        pytest.raises(RuntimeError, match=f"^isa: level '{missing_level}' is not available on this machine"),
        levels.use_isa(missing_level),
    ):
        pass


def run_with_level(level: str) -> subprocess.CompletedProcess:
    code = "from fastlora import isa; print(isa.current_isa())"
    environment = os.environ | {"FASTLORA_ISA": level}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_environment_forces_a_level() -> None:
    result = run_with_level("scalar")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "scalar"


def test_environment_with_an_unknown_level() -> None:
    result = run_with_level("sse9")
    assert result.returncode != 0
    assert "ValueError: isa: expected one of scalar, avx2," in result.stderr
    assert "got 'sse9'" in result.stderr


def test_environment_with_a_level_the_machine_lacks(missing_level: str) -> None:
    result = run_with_level(missing_level)
    assert result.returncode != 0
    assert f"RuntimeError: isa: level '{missing_level}' is not available on this machine" in result.stderr
