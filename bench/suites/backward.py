"""The input's gradient alone: dx = dy·W (+ the adapter's part)."""

from __future__ import annotations

from functools import partial

from _problem import Problem, gradient_errors
from _results import Row
from _sizes import CUDA_ROWS, CUDA_SHAPES, FIVE, SHAPES

from suites import Case, Context, Plan

ROWS = (1, 16, 32, 64, 128, 512, 1024, 2048)
FIVE_ROWS = (16, 32, 64, 128, 512, 1024, 2048)
BASE = ("dense", "fastlora")
OTHERS = (
    "dense + LoRA (PEFT)",
    "bitsandbytes, training mode",
    "PEFT on bitsandbytes",
    "torchao NF4",
)


def cases(plan: Plan) -> list[Case]:
    found = []
    if plan.device == "cuda":
        return _cuda_cases(plan)
    for shape in plan.sizes(FIVE):
        for dtype in plan.kinds(("bfloat16",)):
            for r in plan.ranks:
                for m in plan.counts(ROWS if shape == SHAPES[0] else FIVE_ROWS):
                    names = (*BASE, *OTHERS)
                    if plan.default and (shape != SHAPES[0] or m not in (1, 16, 128, 1024)):
                        names = BASE
                    elif plan.default and m not in (16, 128):
                        names = (*BASE, *OTHERS[:-1])
                    found.append(Case("backward", "dx", *shape, r, m, dtype, names, run))
    return found


def _cuda_cases(plan: Plan) -> list[Case]:
    names = plan.by_route() if plan.routes else (*BASE, "bitsandbytes")
    return [
        Case("backward", "dx", *shape, r, m, dtype, names, run)
        for shape in plan.sizes(CUDA_SHAPES)
        for dtype in plan.kinds(("bfloat16",))
        for r in plan.ranks
        for m in plan.counts(CUDA_ROWS)
    ]


def run(case: Case, context: Context, problem: Problem) -> list[Row]:
    dy = problem.gradient(case.m)
    able = context.peers(case, "grad_input", problem)
    contenders, found, measure = context.attempt(case, able, lambda peer: partial(peer.grad_input, dy))
    errors = [gradient_errors(peer, dy, dx) for peer, dx in zip(contenders, found, strict=True)]
    del found
    rows = []
    for peer, times, error in zip(contenders, measure(), errors, strict=True):
        moved = peer.weight_bytes() + peer.adapter_bytes() + case.m * (case.n + case.k) * dy.element_size()
        flops = 2.0 * case.m * (case.n * case.k + peer.rank * (case.n + case.k))
        roof = context.roof_of_layer(case.m, moved, flops, case.dtype)
        rows.append(context.row(case, peer, times, moved=moved, flops=flops, roof=roof, errors=error))
        peer.forget()
    return rows
