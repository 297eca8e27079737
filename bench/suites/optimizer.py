"""A step of AdamW over one parameter: torch's, one kernel an operation and fused, and fastlora's with float32
and with 8-bit moments, in mapped files or, while there is room, on a device; and the memory that a step takes
beside its moments.

weight_mib is the moments'. The error is the parameter's after three steps, against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from _problem import Errors, Problem, relative
from _results import DENSE, OURS, Row

import fastlora
from fastlora import reference
from suites import Case, Context, Plan

STEP, PEAK = "AdamW step", "peak of an AdamW step"
TORCH, FUSED, EIGHT = "torch AdamW", "torch AdamW, fused", "fastlora, 8-bit moments"
#: name: the contender of the other suites that must be wanted for it, and how it is made.
REGISTRY: dict[str, tuple[str, Callable[..., torch.optim.Optimizer]]] = {
    TORCH: (DENSE, torch.optim.AdamW),
    FUSED: (DENSE, lambda parameters: torch.optim.AdamW(parameters, fused=True)),
    OURS: (OURS, fastlora.PagedAdamW),
    EIGHT: (OURS, fastlora.PagedAdamW8bit),
}
SHAPE = (4096, 4096)
STEPS = 3


def cases(plan: Plan) -> list[Case]:
    if plan.routes:
        return []
    return [
        Case("optimizer", op, n, k, 0, 0, dtype, tuple(REGISTRY), run)
        for n, k in plan.sizes((SHAPE,))
        for dtype in plan.dtypes or ("float32",)
        for op, run in ((STEP, step), (PEAK, peak))
    ]


@dataclass
class Stepper:
    """A contender: an optimiser of one parameter that has a gradient."""

    name: str
    optimizer: torch.optim.Optimizer
    parameter: torch.nn.Parameter
    route: str = ""

    def weight_bytes(self) -> int:
        return sum(t.nbytes for t in self.optimizer.state[self.parameter].values() if t.dim())

    def step(self) -> torch.Tensor:
        self.optimizer.step()
        return self.parameter.detach()


def steppers(case: Case, context: Context, where: str) -> list[Stepper]:
    found = []
    for name, (wanted, make) in REGISTRY.items():
        if wanted in context.wanted:
            parameter = torch.nn.Parameter(drawn(case, 0).to(where))
            parameter.grad = drawn(case, 1).to(where)
            found.append(Stepper(name, make([parameter]), parameter))
    return found


def drawn(case: Case, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(case.n, case.k, generator=generator).to(getattr(torch, case.dtype))


def after_three_steps(case: Case, where: str) -> torch.Tensor:
    p, g = drawn(case, 0).to(where).double(), drawn(case, 1).to(where)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for number in range(1, STEPS + 1):
        p, m, v = reference.adamw(p, g, m, v, 1e-3, (0.9, 0.999), 1e-8, 1e-2, number)
    return p


def step(case: Case, context: Context, problem: Problem) -> list[Row]:
    want = after_three_steps(case, problem.device)
    able, _, measure = context.attempt(case, steppers(case, context, problem.device), lambda one: one.step)
    errors = []
    for one in able:
        one.optimizer.step()
        errors.append(relative(one.step(), want))
    rows = []
    for one, times, error in zip(able, measure(), errors, strict=True):
        size = problem.kind.itemsize
        moved = (
            case.n * case.k * 3 * size + 2 * one.weight_bytes()
        )  # all but the gradient is read and written
        roof = context.roofs and context.roofs.of_copy(moved)
        found = Errors(error, error)
        rows.append(context.row(case, one, times, moved=moved, flops=0, roof=roof, errors=found))
    return rows


def peak(case: Case, context: Context, problem: Problem) -> list[Row]:
    return context.peaks(case, ((one, one.step) for one in steppers(case, context, problem.device)))
