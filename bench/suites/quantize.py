"""Quantising a weight to 4 bits, and dequantising it: into a new tensor, as the libraries' calls do, and into
memory that is there (the system takes as long to hand out new pages as the kernel to fill them)."""

from __future__ import annotations

from functools import partial

import torch
from _problem import Errors, Problem, relative, sampled
from _results import OURS, Row
from _sizes import CUDA_SHAPES, SHAPES
from torch import Tensor

from fastlora import NF4Weight, quantize_nf4
from suites import Case, Context, Plan

NAMES = (
    "bitsandbytes, training mode",
    "torchao NF4",
    "torchao int4",
    "fastlora",
    "fastlora, plain absmax",
)
CUDA_NAMES = ("bitsandbytes", "fastlora", "fastlora, plain absmax")
COMPARED = 2**24  # weights of a matrix whose bits are compared with those that a CPU makes
QUANTIZE, DEQUANTIZE, INTO = "quantize", "dequantize", "dequantize, memory given"


def cases(plan: Plan) -> list[Case]:
    # Torch's allocator on a CUDA device hands out memory for nothing: there is one way to dequantise.
    works = [(QUANTIZE, quantize), (DEQUANTIZE, dequantize), (INTO, dequantize)]
    shapes, names = SHAPES[:1], NAMES
    if plan.device == "cuda":
        works, shapes, names = works[:2], CUDA_SHAPES, CUDA_NAMES
    return [
        Case("quantize", op, n, k, 0, 0, dtype, names, run)
        for n, k in plan.sizes(shapes)
        for dtype in plan.kinds(("bfloat16",))
        for op, run in works
    ]


def quantize(case: Case, context: Context, problem: Problem) -> list[Row]:
    able = context.peers(case, "quantize", problem)
    if context.device.kind == "cuda" and case.n * case.k <= COMPARED:
        for peer in able:
            if peer.name.startswith(OURS):
                same_bits(problem.dense(), peer.layer.quantized_weight)
    contenders, _, measure = context.attempt(case, able, lambda peer: peer.quantize)
    rows = []
    for peer, t in zip(contenders, measure(), strict=True):
        read = problem.weight.numel() * problem.kind.itemsize
        stored, _ = peer.stored()
        total = relative(stored, sampled(problem, problem.weight)[0])
        written = peer.weight_bytes()
        roof = context.roofs and context.roofs.of_quantize(read, written, context.clock.cold)
        errors = Errors(None, total)
        rows.append(context.row(case, peer, t, moved=read + written, flops=0, roof=roof, errors=errors))
    return rows


def same_bits(dense: Tensor, quantized: NF4Weight) -> None:
    """That a device quantised `dense`, and reads it back, to the bits of the CPU's kernels."""
    on_cpu = quantize_nf4(dense.cpu(), double_quant=quantized.double_quant)
    assert quantized.to("cpu") == on_cpu, "the device's bits of the quantised weight differ from the CPU's"
    found = quantized.dequantize().cpu()
    assert torch.equal(found, on_cpu.dequantize()), "the device's dequantised values differ from the CPU's"


def dequantize(case: Case, context: Context, problem: Problem) -> list[Row]:
    into = case.op == INTO
    able = context.peers(case, "dequantize_into" if into else "dequantize", problem)
    out = torch.empty(case.n if into else 0, case.k, dtype=problem.kind)
    contenders, dense, measure = context.attempt(
        case, able, lambda peer: partial(peer.dequantize_into, out) if into else peer.dequantize
    )
    errors = []
    for peer, weight in zip(contenders, dense, strict=True):
        found, _ = sampled(problem, weight)
        stored, _ = peer.stored()
        errors.append(Errors(relative(found, stored), relative(found, sampled(problem, problem.weight)[0])))
    rows = []
    for peer, t, error in zip(contenders, measure(), errors, strict=True):
        moved = peer.weight_bytes() + case.n * case.k * problem.kind.itemsize
        roof = context.roofs and context.roofs.of_copy(moved)
        rows.append(context.row(case, peer, t, moved=moved, flops=0, roof=roof, errors=error))
    return rows
