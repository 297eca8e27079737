"""A training step of one layer: forward, and the gradients of x and of the adapter."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from _problem import Problem, adapter_gradient_error, gradient_errors
from _results import Row
from _sizes import CUDA_SHAPES, FIVE, SHAPES

from suites import Case, Context, Plan

ROWS = (1, 16, 128, 512, 1024)
FIVE_ROWS = (1024,)
CUDA_ROWS, CUDA_OTHER_ROWS = (1, 64, 512, 4096), (4096,)
NAMES = ("dense + LoRA (PEFT)", "PEFT on bitsandbytes", "fastlora")


def cases(plan: Plan) -> list[Case]:
    found = []
    sizes, rows, other_rows = FIVE, ROWS, FIVE_ROWS
    if plan.device == "cuda":
        sizes, rows, other_rows = CUDA_SHAPES, CUDA_ROWS, CUDA_OTHER_ROWS
    for shape in plan.sizes(sizes):
        for dtype in plan.kinds(("bfloat16",)):
            for r in (r for r in plan.ranks if r):
                for m in plan.counts(rows if shape == SHAPES[0] else other_rows):
                    found.append(Case("train", "training step", *shape, r, m, dtype, NAMES, run, passes=2))
    return found


def run(case: Case, context: Context, problem: Problem) -> list[Row]:
    x, dy = problem.activation(case.m).requires_grad_(), problem.gradient(case.m)
    able = [peer for peer in context.peers(case, "step", problem) if peer.has_adapter]
    for peer in able:
        peer.layer.train()
    contenders, gradients, measure = context.attempt(case, able, lambda peer: partial(peer.step, x, dy))
    errors = []
    for peer, (dx, da, db) in zip(contenders, gradients, strict=True):
        assert da is not None
        assert db is not None
        found = gradient_errors(peer, dy, dx)
        worst = max(found.arithmetic, adapter_gradient_error(problem, x.detach(), dy, da, db))
        errors.append(replace(found, arithmetic=worst, composite=None))
    del gradients
    rows = []
    for peer, times, error in zip(contenders, measure(), errors, strict=True):
        activations = case.m * (case.n + case.k) * x.element_size()
        moved = 2 * (peer.weight_bytes() + activations)
        # Both products of W, and the adapter's six: u, its share of y, v, its share of dx, dA, dB.
        flops = 4.0 * case.m * case.n * case.k + 6.0 * case.m * case.r * (case.n + case.k)
        roof = context.roof_of_layer(case.m, moved, flops, case.dtype)
        rows.append(context.row(case, peer, times, moved=moved, flops=flops, roof=roof, errors=error))
    for peer in able:
        peer.layer.train(peer.training)
    return rows
