"""Arguments of the ops of many adapters by name, and what each says of bad ones; for test_ops_contract.py."""

from __future__ import annotations

from typing import Any

import torch
from segmented_cases import Case, Inputs, make_inputs
from torch import Tensor

M, K, NS = 6, 70, (20, 13)
N = sum(NS)
_CASE = Case((1, -1, 0, 1, 2, 1), k=K, ns=NS, ranks=(4, 3, 0))
_NAMES = ("a", "b", "entries", "scaling", "order", "segments", "widths")


def _inputs() -> tuple[Inputs, dict[str, Any]]:
    inputs = make_inputs(_CASE, weight=True)
    for pool in (*inputs.a, *inputs.b):
        pool.nan_to_num_()
    return inputs, dict(zip(_NAMES, inputs.adapters, strict=True))


def route_args() -> dict:
    return {"slots": torch.tensor(_CASE.slots, dtype=torch.int32), "capacity": 3}


def lora_args() -> dict:
    inputs, table = _inputs()
    return {"x": inputs.x} | table | {"y": inputs.y}


def lora_grad_input_args() -> dict:
    inputs, table = _inputs()
    return {"dy": inputs.dy} | table | {"dx": inputs.dx}


def grad_pools_args() -> dict:
    inputs, table = _inputs()
    u = torch.ones(M, sum(inputs.widths), dtype=torch.bfloat16)
    return {"x": inputs.x, "dy": inputs.dy, "u": u, "v": 2 * u} | table


def _weight(inputs: Inputs) -> dict:
    w = inputs.weight
    return {"packed": w.packed, "scales": w.scales, "nested": w.nested}


def multi_linear_args() -> dict:
    inputs, table = _inputs()
    head = {"x": inputs.x} | _weight(inputs) | {"blocksize": 64, "bias": inputs.bias}
    return head | table | {"batch_invariant": False}


def multi_grad_input_args() -> dict:
    inputs, table = _inputs()
    head = {"dy": inputs.dy} | _weight(inputs) | {"in_features": K, "blocksize": 64}
    return head | table | {"batch_invariant": False}


SEGMENTED_ARGS = {
    "lora_route": route_args,
    "segmented_lora": lora_args,
    "segmented_lora_grad_input": lora_grad_input_args,
    "segmented_lora_grad_pools": grad_pools_args,
    "nf4_multi_lora_linear": multi_linear_args,
    "nf4_multi_lora_grad_input": multi_grad_input_args,
}

_GOOD = _inputs()[1]


def _changed(name: str, index: tuple[int, ...], value: int) -> dict[str, Tensor]:
    t = _GOOD[name].clone()
    t[index] = value
    return {name: t}


def _pools(name: str, j: int, pool: Tensor) -> dict[str, list[Tensor]]:
    return {name: [pool if i == j else t for i, t in enumerate(_GOOD[name])]}


A0, B1 = _GOOD["a"][0], _GOOD["b"][1]
ROWS = A0.shape[0]
_MESSAGE = (
    "expected segments as lora_route makes them, slots and first positions ascending, then {-1, routed rows}"
)
TABLE_ERRORS = [
    ({"widths": []}, ValueError, "expected 1 to 8 widths, one a slice, got 0"),
    ({"widths": [4] * 9}, ValueError, "expected 1 to 8 widths, one a slice, got 9"),
    ({"a": _GOOD["a"][:1]}, ValueError, "expected 2 pools a, one a width, got 1"),
    ({"b": [*_GOOD["b"], B1]}, ValueError, "expected 2 pools b, one a width, got 3"),
    (_pools("a", 0, A0.double()), TypeError,
     "expected a[0] in float32, bfloat16 or float16, got torch.float64"),
    (_pools("b", 1, B1.float()), TypeError,
     "expected b[1] in a[0]'s dtype torch.bfloat16, got torch.float32"),
    (_pools("b", 1, B1.to("meta")), RuntimeError, "expected b[1] on cpu, got meta"),
    (_pools("a", 0, A0[:, :69]), ValueError, f"expected a[0] of shape (rows, {K}), got ({ROWS}, 69)"),
    (_pools("b", 1, B1[1:]), ValueError,
     f"expected b[1] of shape ({ROWS}, out_features of the slice), got ({ROWS - 1}, 13)"),
    (_pools("b", 1, B1[:, :12]), ValueError, f"expected pools b of {N} columns together, got [20, 12]"),
    ({"widths": [4, -1]}, ValueError, "expected widths of 0 or more, got -1"),
    ({"entries": _GOOD["entries"].long()}, TypeError, "expected entries in int32, got torch.int64"),
    ({"scaling": _GOOD["scaling"].double()}, TypeError, "expected scaling in float32, got torch.float64"),
    ({"order": _GOOD["order"].long()}, TypeError, "expected order in int32, got torch.int64"),
    ({"segments": _GOOD["segments"].long()}, TypeError, "expected segments in int32, got torch.int64"),
    ({"order": _GOOD["order"].to("meta")}, RuntimeError, "expected order on cpu, got meta"),
    ({"entries": _GOOD["entries"][0]}, ValueError, "expected entries of shape (2, capacity, 2), got (3, 2)"),
    ({"entries": _GOOD["entries"][:1]}, ValueError,
     "expected entries of shape (2, 3, 2) (slices, capacity, {first row, rank}), got (1, 3, 2)"),
    ({"scaling": _GOOD["scaling"][:, :2]}, ValueError,
     "expected scaling of shape (2, 3) (as entries), got (2, 2)"),
    ({"order": _GOOD["order"][:5]}, ValueError, "expected order of shape (6,) (one a row), got (5,)"),
    ({"segments": _GOOD["segments"][:3]}, ValueError,
     "expected segments of shape (4, 2) (min(rows, capacity) + 1 of {slot, first}), got (3, 2)"),
    (_changed("entries", (0, 1, 1), 5), ValueError,
     "expected entries of a rank in 0 .. 4, got 5 for slot 1"),
    (_changed("entries", (1, 2, 1), -1), ValueError,
     "expected entries of a rank in 0 .. 5, got -1 for slot 2"),
    (_changed("entries", (0, 0, 0), ROWS - 3), ValueError,
     f"expected entries inside a pool of {ROWS} rows, got first {ROWS - 3}, rank 4 for slot 0"),
    (_changed("entries", (0, 0, 0), -1), ValueError,
     f"expected entries inside a pool of {ROWS} rows, got first -1, rank 4 for slot 0"),
    (_changed("order", (2,), 6), ValueError,
     "expected order to be a permutation of 6 rows, got 6 at position 2"),
    (_changed("order", (2,), int(_GOOD["order"][1])), ValueError,
     f"expected order to be a permutation of 6 rows, got {int(_GOOD['order'][1])} at position 2"),
    *(
        (changed, ValueError, f"{_MESSAGE} to the end, got {changed['segments'].tolist()}")
        for changed in (
            _changed("segments", (1, 0), 3),  # a slot past the last
            _changed("segments", (1, 0), 0),  # the same twice
            _changed("segments", (0, 1), 1),  # rows before the first
            _changed("segments", (1, 1), 0),  # a segment of no rows
            _changed("segments", (2, 1), 6),  # more rows in the end than the list ends with
            _changed("segments", (3, 1), 7),  # past the last row
            _changed("segments", (3, 0), 2),  # no end
        )
    ),
]  # fmt: skip

_NARROW = torch.ones(M, 9, dtype=torch.bfloat16)
SEGMENTED_ERRORS = [
    (("lora_route",), [
        ({"slots": torch.zeros(3)}, TypeError, "expected slots in int32 or int64, got torch.float32"),
        ({"capacity": -1}, ValueError, "expected a capacity in [0, 2^31), got -1"),
        ({"slots": torch.tensor([0, 1, 3, 2])}, ValueError,
         "expected slots in -1 .. 2, got 3 at position 2 of 4"),
        ({"slots": torch.tensor([[0, 1], [-2, 2]], dtype=torch.int32)}, ValueError,
         "expected slots in -1 .. 2, got -2 at position 2 of 4"),
    ]),
    (("segmented_lora",), [
        *TABLE_ERRORS,
        ({"x": torch.zeros(M, K, dtype=torch.int8)}, TypeError,
         "expected x in float32, bfloat16 or float16, got torch.int8"),
        ({"x": torch.tensor(1.0)}, ValueError,
         "expected x of shape (..., features), got a 0-dimensional tensor"),
        ({"y": torch.zeros(M, N)}, TypeError, "expected y in x's dtype torch.bfloat16, got torch.float32"),
        ({"y": torch.zeros(5, N, dtype=torch.bfloat16)}, ValueError,
         f"expected y of shape ({M}, {N}) (x's rows), got (5, {N})"),
        ({"y": torch.zeros(M, 32, dtype=torch.bfloat16)}, ValueError,
         "expected pools b of 32 columns together, got [20, 13]"),
        ({"y": torch.zeros(N, M, dtype=torch.bfloat16).T}, ValueError,
         f"expected y contiguous, as it is written in place, got strides (1, {M})"),
    ]),
    (("segmented_lora_grad_input",), [
        *TABLE_ERRORS,
        ({"dx": torch.zeros(M, K)}, TypeError, "expected dx in dy's dtype torch.bfloat16, got torch.float32"),
    ]),
    (("segmented_lora_grad_pools",), [
        *TABLE_ERRORS,
        ({"u": _NARROW.float()}, TypeError, "expected u in x's dtype torch.bfloat16, got torch.float32"),
        ({"v": _NARROW[:, :8]}, ValueError,
         "expected v of shape (6, 9) (x's rows, the sum of widths), got (6, 8)"),
        ({"u": _NARROW.to("meta")}, RuntimeError, "expected u on cpu, got meta"),
    ]),
    (("nf4_multi_lora_linear",), [
        *TABLE_ERRORS,
        ({"bias": torch.zeros(N)}, TypeError, "expected bias in x's dtype torch.bfloat16, got torch.float32"),
    ]),
    (("nf4_multi_lora_grad_input",), [
        *(bad for bad in TABLE_ERRORS if "of 33 columns" not in bad[2]),
        ({"in_features": 68}, ValueError,
         "expected packed of shape (33, 34) (a weight of 33 x 68), got (33, 35)"),
    ]),
]  # fmt: skip
