"""Memory: scratch a thread over shapes, the peak of a training step, and the weight as stored."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _problem import Problem
from _results import Row
from peers import Peer

from fastlora import _C
from suites import SHAPES, Case, Context, Plan

SCRATCH, PEAK, WEIGHT = "scratch a thread", "peak of a training step", "weight"
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
STEP_ROWS = 1024
STEP_NAMES = ("dense + LoRA (PEFT)", "PEFT on bitsandbytes", "fastlora")
WEIGHT_NAMES = (
    "dense",
    "bitsandbytes, training mode",
    "torchao NF4",
    "torchao int4",
    "fastlora",
    "fastlora, plain absmax",
)
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def cases(plan: Plan) -> list[Case]:
    found = []
    for shape in plan.sizes(SHAPES[:1]):
        for dtype in plan.kinds(("bfloat16",)):
            for r in plan.ranks:
                found.append(Case("memory", WEIGHT, *shape, r, 0, dtype, WEIGHT_NAMES, weight))
                for m in plan.counts((STEP_ROWS,)):
                    if r:
                        found.append(Case("memory", PEAK, *shape, r, m, dtype, STEP_NAMES, peak, passes=2))
    sizes = SCRATCH_SIZES if plan.default else tuple((*s, m) for s in plan.sizes(()) for m in plan.counts(()))
    for n, k, m in sizes:
        for dtype in plan.kinds(("bfloat16",)):
            for r in plan.ranks:
                found.append(Case("memory", SCRATCH, n, k, r, m, dtype, ("fastlora",), scratch))
    return found


def _row(case: Case, context: Context, peer: str, size: float, weight_bytes: int | None = None) -> Row:
    return Row(
        **case.labels(),
        level=context.level,
        threads=context.threads,
        cache="",
        peer=peer,
        weight_mib=None if weight_bytes is None else weight_bytes / 2**20,
        mib=size / 2**20,
    )


def weight(case: Case, context: Context, problem: Problem) -> list[Row]:
    contenders = context.peers(case.peers, "forward", problem)
    return [_row(case, context, p.name, p.weight_bytes(), p.weight_bytes()) for p in contenders]


def scratch(case: Case, context: Context, problem: Problem) -> list[Row]:
    """What forward and dx leave in a thread that did nothing else: kernels keep their scratch between calls,
    and a thread's goes with it."""
    rows = []
    for peer in context.peers(case.peers, "step", problem):
        forward = partial(peer.forward, problem.activation(case.m))
        backward = partial(peer.grad_input, problem.gradient(case.m))
        held = max(in_fresh_thread(call, context.threads) for call in (forward, backward))
        rows.append(_row(case, context, peer.name, held))
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
    contenders = [peer for peer in context.peers(case.peers, "step", problem) if peer.has_adapter]
    x, dy = problem.activation(case.m).requires_grad_(), problem.gradient(case.m)
    rows = []
    for peer in contenders:
        grown = peak_growth(partial(_step, peer, x, dy))
        if grown is None:
            context.absent[PEAK] = "this system does not reset a process's peak (/proc/self/clear_refs)"
            return rows
        rows.append(_row(case, context, peer.name, grown, peer.weight_bytes()))
    return rows


def _step(peer: Peer, x: torch.Tensor, dy: torch.Tensor) -> None:
    peer.layer.train()
    peer.step(x, dy)
    peer.layer.train(peer.training)


def peak_growth(call: Callable[[], object]) -> int | None:
    """How many bytes of memory `call` takes beside what was there, its result included; None where the system
    cannot tell. It runs once before, so that what it keeps (kernels' scratch, libraries' caches) is there."""
    call()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # freed memory back to the system: it would hide the next call's need
        _CLEAR.write_text("5")  # the peak starts again from now
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
