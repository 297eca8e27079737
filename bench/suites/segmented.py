"""A batch of many adapters: the low-rank term alone, and in the layer's own product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from _many import EQUAL, GATHERED, LAYER, LOOP, ONE, PEFT_BNB, PEFT_DENSE, TERM, Batch, make
from _problem import Errors, Problem
from _results import Row
from _sizes import SHAPES

from suites import Case, Context, Plan

EIGHT = 8


def _each(m: int, r: int) -> tuple[int, ...]:
    """As many adapters as rows."""
    return (r,) * m


def _eight(m: int, r: int) -> tuple[int, ...]:
    return (r,) * min(m, EIGHT)


def _mixed(m: int, r: int) -> tuple[int, ...]:
    """From 8 to 64, whatever r is."""
    return tuple(range(8, 65, 8))[: min(m, EIGHT)]


@dataclass(frozen=True)
class Work:
    """One op of the suite: its rows of x on a CPU and on a CUDA device, and the ranks of its adapters.

    Where every row has an adapter of its own a call is half a millisecond, of which a Python that was thrown
    out of the caches with everything else takes 0.2 before it reaches anybody's kernel. In a model the next
    layer's call is the same code: so a few layers are timed together, whose adapters are all cold."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    cuda_rows: tuple[int, ...]
    ranks: Callable[[int, int], tuple[int, ...]]
    layer: bool = False
    step: bool = False
    stack: int = 1  # layers one after the other, each with adapters of its own


EACH, LAYER_EACH, LAYER_EIGHT = "term, an adapter a row", "layer, an adapter a row", "layer, 8 adapters"
MIXED, STEP = "term, ranks 8 to 64", "training step of the term, 8 adapters"
WORKS = {
    EACH: Work(("fastlora", LOOP, GATHERED), (64,), (64,), _each, stack=4),
    LAYER_EACH: Work(("fastlora", PEFT_DENSE, PEFT_BNB), (64,), (64,), _each, layer=True, stack=4),
    LAYER_EIGHT: Work(("fastlora", ONE, PEFT_DENSE, PEFT_BNB), (1024,), (4096,), _eight, layer=True),
    MIXED: Work(("fastlora", EQUAL), (64, 1024), (64, 4096), _mixed),
    STEP: Work(("fastlora", LOOP), (1024,), (4096,), _eight, step=True),
}


def cases(plan: Plan) -> list[Case]:
    if plan.routes:
        return []
    return [
        Case("segmented", op, *shape, r, m, dtype, work.names, run, passes=2 if work.step else 1)
        for shape in plan.sizes(SHAPES[:1])
        for dtype in plan.kinds(("bfloat16",))
        for r in plan.ranks
        if r
        for op, work in WORKS.items()
        for m in plan.counts(work.cuda_rows if plan.device == "cuda" else work.rows)
    ]


def run(case: Case, context: Context, problem: Problem) -> list[Row]:
    work = WORKS[case.op]
    others = [problem.again() for _ in range(work.stack - 1)]
    batches = [Batch(one, case.m, work.ranks(case.m, case.r)) for one in (problem, *others)]
    batch = batches[0]
    made, absent = make(LAYER if work.layer else TERM, case.peers, context.wanted, *batches)
    context.absent.update({f"{name}, {case.op}": why for name, why in absent.items()})
    contenders, results, measure = context.attempt(
        case, made, lambda one: one.step if work.step else one.forward
    )
    errors = [
        _step_errors(one.batch, found) if work.step else one.batch.errors(found, one)
        for one, found in zip(contenders, results, strict=True)
    ]
    del results
    rows = []
    for one, stack, error in zip(contenders, measure(), errors, strict=True):
        times = stack.each_of(work.stack)
        moved, flops = one.weight_bytes() + one.batch.adapter_bytes(), one.batch.flops()
        activations = case.m * (case.n + case.k) * batch.x.element_size()
        if work.layer:
            flops += 2.0 * case.m * case.n * case.k
            roof = context.roof_of_layer(case.m, moved + activations, flops, case.dtype)
        else:
            passes = 3 if work.step else 1
            moved, flops = passes * moved, passes * flops
            roof = _roof_of_term(case, context, moved, activations, flops)
        rows.append(context.row(case, one, times, moved=moved, flops=flops, roof=roof, errors=error))
    return rows


def _roof_of_term(
    case: Case, context: Context, adapters: int, activations: int, flops: float
) -> tuple[str, float] | None:
    """A CPU's is one read of the adapters where few rows share one; a device's takes x and y into account."""
    roofs = context.roofs
    if roofs is None:
        return None
    if context.device.kind == "cuda":
        return roofs.of_layer(case.m, adapters + 2 * activations, flops, case.dtype, context.clock.cold)
    if case.op == EACH:
        return roofs.of_read(adapters, context.clock.cold)
    return roofs.of_product(flops, case.dtype)


def _step_errors(batch: Batch, found: list) -> Errors:
    error = batch.gradient_error(found[0], found[1:])
    return Errors(error, error)
