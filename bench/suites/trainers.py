"""A language model of a few layers under PEFT: its training step, its greedy answer to a short prompt, and
the memory that both take; a fresh process a contender. Losses are compared before anything is measured."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import peers
from _problem import Errors, Problem
from _results import OURS, Row
from _timing import Effort, percentiles, turns
from _trainers import (
    EXACT_BNB,
    EXACT_DENSE,
    PATCHED,
    PATCHED_BNB,
    PEFT_BNB,
    PEFT_BNB_EVAL,
    PEFT_DENSE,
    REGISTRY,
    Contender,
    Sizes,
    distance,
)

import fastlora
from suites import Case, Context, Plan

STEP, TOKEN = "training step of a model", "token of an answer"
STEP_PEAK, TOKEN_PEAK = "peak of a model's training step", "peak of a model's answer"
#: op: its contenders, and what their processes are asked for; memory first, while nothing else was.
WORKS = {
    STEP_PEAK: ((PEFT_DENSE, PEFT_BNB, PATCHED_BNB, PATCHED), "peak_of_step"),
    TOKEN_PEAK: ((PEFT_DENSE, PEFT_BNB, PEFT_BNB_EVAL, PATCHED_BNB, PATCHED), "peak_of_answer"),
    STEP: ((PEFT_DENSE, PEFT_BNB, PATCHED_BNB, PATCHED), "step"),
    TOKEN: ((PEFT_DENSE, PEFT_BNB, PEFT_BNB_EVAL, PATCHED_BNB, PATCHED), "answer"),
}
# TinyLlama's layers (its up_proj, out x in), four of the 22, and of the vocabulary what goes with four.
SHAPE, LAYERS, VOCABULARY = (5632, 2048), 4, 5824
QUICK_SHAPE, QUICK_LAYERS, QUICK_VOCABULARY = (256, 128), 2, 256
TOKENS, QUICK_TOKENS = 512, 32
EFFORT = Effort(seconds=5.0, least=3, most=15)
LOSSES_AGREE = 0.02  # relative


def cases(plan: Plan) -> list[Case]:
    """rows: the tokens of a training step."""
    if plan.routes or plan.device != "cpu":
        return []
    quick = plan.quick
    shapes = plan.shapes or ((QUICK_SHAPE,) if quick else (SHAPE,))
    tokens = max(plan.rows) if plan.rows else QUICK_TOKENS if quick else TOKENS
    measure = partial(run, quick=quick, tokens=tokens)
    return [
        Case("trainers", op, *shape, r, 1 if op in (TOKEN, TOKEN_PEAK) else tokens, dtype, names, measure)
        for shape in shapes
        for dtype in plan.kinds(("bfloat16",))
        for r in plan.ranks
        if r
        for op, (names, _) in WORKS.items()
    ]


def run(case: Case, context: Context, problem: Problem, *, quick: bool, tokens: int) -> list[Row]:
    sizes = Sizes(
        hidden=case.k,
        intermediate=case.n,
        layers=QUICK_LAYERS if quick else LAYERS,
        vocabulary=QUICK_VOCABULARY if quick else VOCABULARY,
        tokens=tokens,
        rank=case.r,
        dtype=problem.kind,
        answer=4 if quick else 16,
    )
    if case.k % 64 or case.n % 64:
        context.absent[f"models of {case.n}x{case.k}"] = (
            "bitsandbytes dequantises only multiples of 64 rightly"
        )
        return []
    contenders = problem.once("models", lambda: _begun(context, sizes))
    command = WORKS[case.op][1]
    asked, first = _able(context, [one for one in contenders if one.name in case.peers], command)
    if case.op in (STEP_PEAK, TOKEN_PEAK):
        grown = [(one, size) for one, (_, size) in zip(asked, first, strict=True) if size is not None]
        return [context.memory_row(case, one, size, one.weight_bytes()) for one, size in grown]
    effort = context.effort if quick else EFFORT
    rows = []
    for one, times in zip(asked, _in_turns(asked, command, effort, first), strict=True):
        passes, error = (1, one.errors["logits"]) if case.op == TOKEN else (2, one.errors["gradients"])
        row = context.row(
            case,
            one,
            percentiles([t / (sizes.answer if case.op == TOKEN else 1) for t in times]),
            moved=passes * one.weight_bytes(),
            flops=passes * 2.0 * case.m * one.checked["weights"],
            roof=None,
            errors=Errors(error, error),
        )
        rows.append(replace(row, cache=""))
    return rows


def _begun(context: Context, sizes: Sizes) -> list[Contender]:
    """Those that are wanted and whose loss is what it should be."""
    names = []
    for name, peer in REGISTRY.items():
        if peer in context.wanted:
            lacks = _lacks(name)
            if lacks:
                context.absent[f"{name}, a model"] = lacks
            else:
                names.append(name)
    exact = {name: _checked(Contender(name, sizes, context.threads)) for name in _exact_ones(names)}
    started = [Contender(name, sizes, context.threads) for name in names]
    return [one for one in started if _agrees(context, one, exact)]


def _lacks(name: str) -> str:
    """Why a contender cannot be made; "" if it can."""
    for library in ("transformers", "peft", "bitsandbytes"):
        if find_spec(library) is None:
            return f"{library} is not installed"
    function = {PATCHED: "patch", PATCHED_BNB: "patch_bitsandbytes"}.get(name)
    if function and not hasattr(fastlora, function):
        return f"this fastlora has no {function}"
    if name == PATCHED_BNB:
        from fastlora.integrations import bitsandbytes_patch

        try:
            bitsandbytes_patch.require()
        except ImportError as error:  # of a torch or a bitsandbytes of another version
            return str(error)
    return ""


def _exact_ones(names: list[str]) -> list[str]:
    return list(dict.fromkeys(EXACT_DENSE if name == PEFT_DENSE else EXACT_BNB for name in names))


def _checked(one: Contender) -> dict:
    _, found = one.run("check")
    one.close()
    return found


def _agrees(context: Context, one: Contender, exact: dict[str, dict]) -> bool:
    want = exact[EXACT_DENSE if one.name == PEFT_DENSE else EXACT_BNB]
    try:
        _, one.checked = one.run("check")
        loss = one.checked["loss"]
        if not abs(loss / want["loss"] - 1) < LOSSES_AGREE:
            raise RuntimeError(f"expected a loss of {want['loss']:.4f}, got {loss:.4f}")
    except RuntimeError as error:
        _leave_out(context, one, error)
        return False
    one.errors = {name: distance(one.checked[name], want[name]) for name in ("gradients", "logits")}
    return True


def _able(
    context: Context, contenders: list[Contender], command: str
) -> tuple[list[Contender], list[tuple[float, Any]]]:
    """Those that could, and the seconds and results of their first calls."""
    able, first = [], []
    for one in contenders:
        try:
            first.append(one.run(command))
            able.append(one)
        except RuntimeError as error:
            _leave_out(context, one, error)
    return able, first


def _leave_out(context: Context, one: Contender, error: Exception) -> None:
    where = context.failed if one.name.startswith(OURS) else context.absent
    where[f"{one.name}, a model"] = peers.reason(error)


def _in_turns(
    contenders: list[Contender], command: str, effort: Effort, first: list[tuple[float, Any]]
) -> list[list[float]]:
    """The seconds of every one's calls, A B C A B C ..., by its own clock, the first ones left out."""
    rounds = [effort.rounds(seconds) for seconds, _ in first]
    times: list[list[float]] = [[] for _ in contenders]
    for i in turns(rounds):
        times[i].append(contenders[i].run(command)[0])
    return times
