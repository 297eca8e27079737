"""Quantising a weight to 4 bits, and dequantising it: into a new tensor, as the libraries' calls do, and into
memory that is there (the system takes as long to hand out new pages as the kernel to fill them)."""

from __future__ import annotations

from functools import partial

import torch
from _problem import Errors, Problem, relative, sampled
from _results import Row

from suites import SHAPES, Case, Context, Plan

NAMES = (
    "bitsandbytes, training mode",
    "torchao NF4",
    "torchao int4",
    "fastlora",
    "fastlora, plain absmax",
)
QUANTIZE, DEQUANTIZE, INTO = "quantize", "dequantize", "dequantize, memory given"


def cases(plan: Plan) -> list[Case]:
    return [
        Case("quantize", op, n, k, 0, 0, dtype, NAMES, run)
        for n, k in plan.sizes(SHAPES[:1])
        for dtype in plan.kinds(("bfloat16",))
        for op, run in ((QUANTIZE, quantize), (DEQUANTIZE, dequantize), (INTO, dequantize))
    ]


def quantize(case: Case, context: Context, problem: Problem) -> list[Row]:
    able = context.peers(case.peers, "quantize", problem)
    contenders, _, measure = context.attempt(able, lambda peer: peer.quantize)
    rows = []
    for peer, t in zip(contenders, measure(), strict=True):
        read = problem.weight.numel() * problem.kind.itemsize
        stored, _ = peer.stored()
        total = relative(stored, sampled(problem, problem.weight)[0])
        # The floor is one read of the weight: what is written is a quarter of it or less.
        roof = context.roofs.of_read(read, context.flush is not None) if context.roofs else None
        rows.append(
            context.row(
                case,
                peer,
                t,
                moved=read + peer.weight_bytes(),
                flops=0,
                roof=roof,
                errors=Errors(None, total),
            )
        )
    return rows


def dequantize(case: Case, context: Context, problem: Problem) -> list[Row]:
    into = case.op == INTO
    able = context.peers(case.peers, "dequantize_into" if into else "dequantize", problem)
    out = torch.empty(case.n, case.k, dtype=problem.kind)
    contenders, dense, measure = context.attempt(
        able, lambda peer: partial(peer.dequantize_into, out) if into else peer.dequantize
    )
    errors = []
    for peer, weight in zip(contenders, dense, strict=True):
        found, _ = sampled(problem, weight)
        stored, _ = peer.stored()
        errors.append(Errors(relative(found, stored), relative(found, sampled(problem, problem.weight)[0])))
    rows = []
    for peer, t, error in zip(contenders, measure(), errors, strict=True):
        moved = peer.weight_bytes() + out.nbytes
        roof = context.roofs.of_copy(moved) if context.roofs else None
        rows.append(context.row(case, peer, t, moved=moved, flops=0, roof=roof, errors=error))
    return rows
