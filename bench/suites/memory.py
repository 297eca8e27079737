"""Memory: scratch over shapes, the peak of a training step, and the weight as stored."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import torch
from _problem import Problem
from _results import Row
from _sizes import CUDA_SHAPES, SHAPES
from peers import Peer

from fastlora import _C
from suites import Case, Context, Plan

SCRATCH, CALL_SCRATCH = "scratch a thread", "scratch of a call"
PEAK, WEIGHT = "peak of a training step", "weight"
# n, k, rows: the real shapes' corners, a vocabulary, and sizes no model has yet.
SCRATCH_SIZES = (
    (4096, 4096, 1),
    (4096, 4096, 2048),
    (14336, 4096, 2048),
    (4096, 14336, 2048),
    (4304, 1152, 128),
    (128256, 256, 512),
    (256, 152064, 64),
    (64, 1000000, 8),
    (64, 1000000, 64),
    (64, 64, 65536),
)
CUDA_SCRATCH_SIZES = tuple((*shape, m) for shape in CUDA_SHAPES for m in (1, 512, 4096))
STEP_ROWS, CUDA_STEP_ROWS = 1024, 4096
STEP_NAMES = ("dense + LoRA (PEFT)", "PEFT on bitsandbytes", "fastlora")
WEIGHT_NAMES = (
    "dense",
    "bitsandbytes, training mode",
    "torchao NF4",
    "torchao int4",
    "fastlora",
    "fastlora, plain absmax",
)
CUDA_WEIGHT_NAMES = ("dense", "bitsandbytes", "fastlora", "fastlora, plain absmax")


def cases(plan: Plan) -> list[Case]:
    found = []
    shapes, step_rows, names = SHAPES[:1], STEP_ROWS, WEIGHT_NAMES
    sizes, op, run = SCRATCH_SIZES, SCRATCH, scratch
    if plan.device == "cuda":
        shapes, step_rows, names = CUDA_SHAPES, CUDA_STEP_ROWS, CUDA_WEIGHT_NAMES
        sizes, op, run = CUDA_SCRATCH_SIZES, CALL_SCRATCH, scratch_of_call
    for shape in plan.sizes(shapes):
        for dtype in plan.kinds(("bfloat16",)):
            for r in plan.ranks:
                found.append(Case("memory", WEIGHT, *shape, r, 0, dtype, names, weight))
                for m in plan.counts((step_rows,)):
                    if r:
                        found.append(Case("memory", PEAK, *shape, r, m, dtype, STEP_NAMES, peak, passes=2))
    if not plan.default:
        sizes = tuple((*s, m) for s in plan.sizes(()) for m in plan.counts(()))
    for n, k, m in sizes:
        for dtype in plan.kinds(("bfloat16",)):
            for r in plan.ranks:
                found.append(Case("memory", op, n, k, r, m, dtype, ("fastlora",), run))
    return found


def weight(case: Case, context: Context, problem: Problem) -> list[Row]:
    contenders = context.peers(case, "forward", problem)
    return [context.memory_row(case, p, p.weight_bytes(), p.weight_bytes()) for p in contenders]


def scratch(case: Case, context: Context, problem: Problem) -> list[Row]:
    """What forward and dx leave in a thread that did nothing else: kernels keep their scratch between calls,
    and a thread's goes with it."""
    rows = []
    for peer in context.peers(case, "step", problem):
        forward = partial(peer.forward, problem.activation(case.m))
        backward = partial(peer.grad_input, problem.gradient(case.m))
        held = max(in_fresh_thread(call, context.threads) for call in (forward, backward))
        rows.append(context.memory_row(case, peer, held))
    return rows


def scratch_of_call(case: Case, context: Context, problem: Problem) -> list[Row]:
    """What forward and dx take from torch's allocator beside their results: the larger."""
    rows = []
    for peer in context.peers(case, "step", problem):
        calls = (
            (partial(peer.forward, problem.activation(case.m)), case.n),
            (partial(peer.grad_input, problem.gradient(case.m)), case.k),
        )
        held = 0
        for call, width in calls:
            result = case.m * width * problem.kind.itemsize
            held = max(held, (context.device.peak_growth(call) or 0) - result)
        rows.append(context.memory_row(case, peer, held))
    return rows


def in_fresh_thread(call: Callable[[], object], threads: int) -> int:
    """The bytes of scratch that the caller's share of `call` takes: the first of `threads` shares, of which
    none is larger."""
    held: list[int] = []

    def body() -> None:
        torch.set_num_threads(threads)  # a thread that torch did not start begins with its own count
        call()
        held.append(_C.scratch_bytes())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return held[0]


def peak(case: Case, context: Context, problem: Problem) -> list[Row]:
    able = [peer for peer in context.peers(case, "step", problem) if peer.has_adapter]
    x, dy = problem.activation(case.m).requires_grad_(), problem.gradient(case.m)
    contenders, _, _ = context.attempt(case, able, lambda peer: partial(_step, peer, x, dy))
    return context.peaks(case, ((peer, partial(_step, peer, x, dy)) for peer in contenders))


def _step(peer: Peer, x: torch.Tensor, dy: torch.Tensor) -> None:
    peer.layer.train()
    peer.step(x, dy)
    peer.layer.train(peer.training)
