"""Forward of a layer: y = x·Wᵀ (+ the adapter), without gradients."""

from __future__ import annotations

from functools import partial

from _problem import Problem, forward_errors
from _results import Row
from _sizes import CUDA_ROWS, CUDA_SHAPES, FIVE, SHAPES

from suites import Case, Context, Plan

ROWS = (1, 4, 8, 16, 32, 64, 128, 512, 1024, 2048)
FLOAT32_ROWS = (1, 128)
SMALL_FLOAT32_ROWS = (1, 128, 512)  # of layers up to 4096 x 4096: the others would take a tenth of the run
OTHER_ROWS = (1, 16, 128, 1024)  # of the shapes beyond the targets'
VARIANT_ROWS = (1, 16, 128, 1024)  # where the adapter's and the double quantisation's share is taken

BASE = ("dense", "fastlora")
VARIANTS = ("fastlora, no adapter", "fastlora, plain absmax")
OTHERS = (
    "dense + LoRA (PEFT)",
    "bitsandbytes, training mode",
    "bitsandbytes, eval mode",
    "PEFT on bitsandbytes",
    "torchao NF4",
    "torchao int4",
)
CUDA_OTHERS = (
    "dense + LoRA (PEFT)",
    "bitsandbytes",
    "PEFT on bitsandbytes",
    "torchao NF4",
    "torchao int4",
)
SLOW = "torchao NF4"  # 6 ns a weight at any m: three row counts show it


def cases(plan: Plan) -> list[Case]:
    found = []
    on_cuda = plan.device == "cuda"
    everyone = (*BASE, *VARIANTS, *(CUDA_OTHERS if on_cuda else OTHERS))
    names_of = _cuda_names if on_cuda else _names
    for shape in plan.sizes(CUDA_SHAPES if on_cuda else SHAPES):
        for dtype in plan.kinds(("bfloat16",) if on_cuda else ("bfloat16", "float32")):
            for r in plan.ranks:
                for m in plan.counts(CUDA_ROWS if on_cuda else _rows(shape, dtype)):
                    names = names_of(shape, dtype, m) if plan.default else everyone
                    if plan.routes:
                        names = plan.by_route()
                    if r == 0:
                        names = tuple(name for name in names if "no adapter" not in name)
                    found.append(Case("linear", "forward", *shape, r, m, dtype, names, run))
    return found


def _rows(shape: tuple[int, int], dtype: str) -> tuple[int, ...]:
    if dtype != "bfloat16":
        if shape not in FIVE:
            return ()
        return SMALL_FLOAT32_ROWS if shape[0] * shape[1] <= 4096 * 4096 else FLOAT32_ROWS
    return ROWS if shape in FIVE else OTHER_ROWS


def _names(shape: tuple[int, int], dtype: str, m: int) -> tuple[str, ...]:
    """The default set: every contender at the first shape, and at the others what the targets ask for."""
    if dtype != "bfloat16":
        return BASE
    names = BASE + (VARIANTS if m in VARIANT_ROWS and shape in FIVE else ())
    if shape == SHAPES[0] and m <= 1024:
        return names + tuple(name for name in OTHERS if name != SLOW or m in (1, 16, 128))
    return (*names, "bitsandbytes, eval mode") if m == 1 else names


def _cuda_names(shape: tuple[int, int], dtype: str, m: int) -> tuple[str, ...]:
    """The same on a CUDA device."""
    if shape == CUDA_SHAPES[0] and m in VARIANT_ROWS:
        return (*BASE, *VARIANTS, *CUDA_OTHERS)
    names = (*BASE, "bitsandbytes", "fastlora, no adapter")
    return (*names, "PEFT on bitsandbytes") if m <= 4 or m >= 2048 else names


def run(case: Case, context: Context, problem: Problem) -> list[Row]:
    x = problem.activation(case.m)
    able = context.peers(case, "forward", problem)
    contenders, found, measure = context.attempt(case, able, lambda peer: partial(peer.forward, x))
    errors = [forward_errors(peer, x, y) for peer, y in zip(contenders, found, strict=True)]
    del found
    rows = []
    for peer, times, error in zip(contenders, measure(), errors, strict=True):
        moved = peer.weight_bytes() + peer.adapter_bytes() + case.m * (case.n + case.k) * x.element_size()
        flops = 2.0 * case.m * (case.n * case.k + peer.rank * (case.n + case.k))
        roof = context.roof_of_layer(case.m, moved, flops, case.dtype)
        rows.append(context.row(case, peer, times, moved=moved, flops=flops, roof=roof, errors=error))
    return rows
