"""Arguments of the ops of stacked experts by name, and what each says of bad ones: test_ops_contract.py."""

from __future__ import annotations

from functools import lru_cache

import torch
from linear_cases import Weight, make_weight
from torch import Tensor

from fastlora import reference

E, M, N, K, R = 3, 6, 33, 70, 4
# Two rows of expert 0, none of 1, three of 2, and one of nobody.
SLOTS = (2, 0, -1, 2, 0, 2)


@lru_cache(maxsize=8)
def make_stack(experts: int, n: int, k: int, blocksize: int = 64, double_quant: bool = True) -> Weight:
    """Expert e is make_weight's with seed e."""
    each = [make_weight(n, k, blocksize, double_quant, seed=e) for e in range(experts)]
    nested = [w.nested for w in each if w.nested is not None]
    return Weight(
        torch.stack([w.packed for w in each]),
        torch.stack([w.scales for w in each]),
        torch.stack(nested) if nested else None,
        blocksize,
        torch.stack([w.dense for w in each]),
    )


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.3).to(dtype)


def _head(name: str, features: int) -> dict:
    _, segments = reference.lora_route(torch.tensor(SLOTS), E)
    w = make_stack(E, N, K)
    rows = {name: _normal(M, features), "segments": segments}
    return rows | {"packed": w.packed, "scales": w.scales, "nested": w.nested}


def _lora() -> dict:
    a, b = _normal(E, R, K, dtype=torch.float32), _normal(E, N, R, dtype=torch.float32)
    return {"lora_a": a, "lora_b": b, "scaling": 0.5, "seed": None, "dropout": 0.0}


def linear_args() -> dict:
    return _head("x", K) | {"blocksize": 64, "bias": _normal(E, N)} | _lora()


def grad_input_args() -> dict:
    return _head("dy", N) | {"in_features": K, "blocksize": 64} | _lora()


def grads_args() -> dict:
    rows = {"dy": _normal(M, N), "x": _normal(M, K), "u": _normal(M, R), "v": _normal(M, R)}
    return rows | {"segments": _head("x", K)["segments"]} | _lora()


def grad_bias_args() -> dict:
    return {"dy": _normal(M, N), "segments": _head("x", K)["segments"], "experts": E}


EXPERTS_ARGS = {
    "nf4_experts_linear": linear_args,
    "nf4_experts_grad_input": grad_input_args,
    "lora_experts_grads": grads_args,
    "nf4_experts_grad_bias": grad_bias_args,
}

_uint8 = torch.uint8
_x, _dy, _u = torch.zeros(M, K, dtype=torch.bfloat16), _normal(M, N), _normal(M, R)
_segments = linear_args()["segments"]
STACK_ERRORS = [
    ({"packed": torch.zeros(E, N, 34, dtype=_uint8)}, ValueError,
     "expected packed of shape (experts, n, 35) for 70 in_features, got (3, 33, 34)"),
    ({"packed": torch.zeros(N, 35, dtype=_uint8)}, ValueError,
     "expected packed of shape (experts, n, 35) for 70 in_features, got (33, 35)"),
    ({"packed": torch.zeros(E, N, 35, dtype=torch.int8)}, TypeError,
     "expected packed in uint8, got torch.int8"),
    ({"scales": torch.zeros(E, 37)}, TypeError, "expected scales in uint8, got torch.float32"),
    ({"scales": torch.zeros(E * 37, dtype=_uint8)}, ValueError,
     "expected scales of shape (3, 37) (37 blocks an expert, one byte each), got (111,)"),
    ({"nested": None}, ValueError,
     "expected scales of shape (3, 148) (37 blocks an expert, 4 bytes each), got (3, 37)"),
    ({"nested": torch.zeros(E, 4, dtype=_uint8)}, ValueError,
     "expected nested of shape (3, 8) (of each expert an offset and 1 scales of 4 bytes), got (3, 4)"),
    ({"nested": torch.zeros(E, 8, dtype=_uint8, device="meta")}, RuntimeError,
     "expected nested on cpu, got meta"),
    ({"blocksize": 48}, ValueError,
     "expected blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096), got 48"),
]  # fmt: skip
SEGMENTS_ERRORS = [
    ({"segments": _segments.long()}, TypeError, "expected segments in int32, got torch.int64"),
    ({"segments": _segments[:3]}, ValueError,
     "expected segments of shape (4, 2) (min(rows, experts) + 1 of {expert, first row}), got (3, 2)"),
    ({"segments": _segments.to("meta")}, RuntimeError, "expected segments on cpu, got meta"),
    *(
        ({"segments": torch.tensor(bad, dtype=torch.int32)}, ValueError,
         f"expected segments as lora_route makes them of 6 rows and 3 experts, got {bad}")
        for bad in (
            [[3, 0], [-1, 6], [-1, 6], [-1, 6]],
            [[0, 1], [-1, 6], [-1, 6], [-1, 6]],
            [[0, 0], [-1, 7], [-1, 7], [-1, 7]],
            [[0, 0], [2, 4], [-1, 3], [-1, 3]],
        )
    ),
]  # fmt: skip
LORA_ERRORS = [
    ({"lora_b": torch.zeros(E, N, R, dtype=torch.float16)}, TypeError,
     "expected lora_b in lora_a's dtype torch.float32, got torch.float16"),
    ({"lora_a": torch.zeros(E, R, K, dtype=torch.int32)}, TypeError,
     "expected lora_a in float32, bfloat16 or float16, got torch.int32"),
    ({"lora_a": torch.zeros(E, R, K, device="meta")}, RuntimeError, "expected lora_a on cpu, got meta"),
    ({"lora_b": torch.zeros(E, N, R, device="meta")}, RuntimeError, "expected lora_b on cpu, got meta"),
    ({"lora_a": torch.zeros(E + 1, R, K)}, ValueError, "expected lora_a of shape (3, r, 70), got (4, 4, 70)"),
    ({"lora_a": torch.zeros(R, K)}, ValueError, "expected lora_a of shape (3, r, 70), got (4, 70)"),
    ({"lora_a": torch.zeros(E, R + 1, K)}, ValueError,
     "expected lora_b of shape (3, 33, 5) (experts, out_features, rank), got (3, 33, 4)"),
    ({"seed": torch.tensor(1.0)}, TypeError, "expected seed as one int64, got torch.float32 of shape ()"),
    ({"seed": torch.tensor(1, device="meta")}, RuntimeError, "expected seed on cpu, got meta"),
    ({"dropout": 1.0}, ValueError, "expected dropout in [0, 1), got 1.0"),
]  # fmt: skip
ONE_OF_TWO = [
    ({name: None}, ValueError, "expected lora_a and lora_b together, got only one of them")
    for name in ("lora_a", "lora_b")
]
LINEAR_ERRORS = [
    ({"x": _x.double()}, TypeError, "expected x in float32, bfloat16 or float16, got torch.float64"),
    ({"x": _x[0]}, ValueError, "expected x of shape (rows, features), got (70,)"),
    ({"x": _x[None]}, ValueError, "expected x of shape (rows, features), got (1, 6, 70)"),
    ({"bias": torch.zeros(E, N)}, TypeError, "expected bias in x's dtype torch.bfloat16, got torch.float32"),
    ({"bias": _normal(N)}, ValueError,
     "expected bias of shape (3, 33) (experts, out_features), got (33,)"),
    ({"bias": _normal(E, N).to("meta")}, RuntimeError, "expected bias on cpu, got meta"),
]  # fmt: skip
DY_ERRORS = [
    ({"dy": _dy.double()}, TypeError, "expected dy in float32, bfloat16 or float16, got torch.float64"),
    ({"dy": _dy[:, :32]}, ValueError, "expected dy of shape (rows, 33), got (6, 32)"),
]  # fmt: skip
GRADS_ERRORS = [
    *DY_ERRORS,
    ({"lora_b": torch.zeros(N, R)}, ValueError, "expected lora_b of shape (experts, n, r), got (33, 4)"),
    ({"x": _x.float()}, TypeError, "expected x in dy's dtype torch.bfloat16, got torch.float32"),
    ({"x": _x[:5]}, ValueError, "expected x of shape (6, 70) (dy's rows), got (5, 70)"),
    ({"u": _u[:, :3]}, ValueError, "expected u of shape (6, 4) (dy's rows), got (6, 3)"),
    ({"v": _u[0]}, ValueError, "expected v of shape (rows, features), got (4,)"),
    ({"v": _u.to("meta")}, RuntimeError, "expected v on cpu, got meta"),
]  # fmt: skip
BIAS_ERRORS = [
    ({"dy": _dy[0]}, ValueError, "expected dy of shape (rows, features), got (33,)"),
    ({"experts": 0}, ValueError, "expected 1 expert or more, got 0"),
]  # fmt: skip

EXPERTS_ERRORS = (
    (("nf4_experts_linear",),
     LINEAR_ERRORS + STACK_ERRORS + SEGMENTS_ERRORS + LORA_ERRORS + ONE_OF_TWO),
    (("nf4_experts_grad_input",), DY_ERRORS + STACK_ERRORS + SEGMENTS_ERRORS + LORA_ERRORS + ONE_OF_TWO),
    (("lora_experts_grads",), GRADS_ERRORS + SEGMENTS_ERRORS + LORA_ERRORS),
    (("nf4_experts_grad_bias",), SEGMENTS_ERRORS + BIAS_ERRORS),
)  # fmt: skip
