"""bench/: a small model under PEFT, a process a contender. Times are not looked at."""

from __future__ import annotations

import pytest
import torch
from bench_parts import a_context, bench_on_path, module, run_options  # noqa: F401
from needs import PATCHING, older_than

for library in ("transformers", "peft", "bitsandbytes"):
    pytest.importorskip(library, reason=f"needs {library}")


@pytest.fixture(scope="module")
def measured(bench_on_path):  # noqa: F811
    """Stock and ours at the smallest size: (rows, context)."""
    context = a_context(wanted=frozenset({"PEFT on bitsandbytes", "fastlora"}))
    options = run_options(
        "--suite", "trainers", "--quick", "--shapes", "128x64", "--rows", "8", "--ranks", "4"
    )
    cases = module("_cases").cases_of(module("run").plan_of(options))
    return module("_cases").measure(cases, context), context


def test_every_contender_is_measured_or_named(measured):
    rows, context = measured
    trainers = module("suites.trainers")
    assert not context.failed
    for op, (names, _) in trainers.WORKS.items():
        wanted = {name for name in names if not name.startswith("dense")}
        absent = {name for name in wanted if f"{name}, a model" in context.absent}
        assert {row.peer for row in rows if row.op == op} == wanted - absent
        new = {"fastlora.patch_bitsandbytes()"} if older_than(PATCHING[0]) else set()
        assert absent <= {"fastlora.patch(model)"} | new


def test_rows_have_times_or_memory(measured):
    rows, _ = measured
    for row in rows:
        assert row.weight_mib > 0
        if row.op.startswith("peak"):
            assert row.mib > row.weight_mib
            assert row.p50_us is None
        else:
            assert 0 < row.p20_us <= row.p50_us <= row.p80_us
            assert row.arithmetic_error < 0.05, row


def test_the_rows_are_what_the_targets_ask_for(measured):
    rows, _ = measured
    targets = [t for t in module("targets").of_device("cpu") if t.suite == "trainers"]
    assert targets
    for target in targets:
        assert target.op in {row.op for row in rows}
        assert target.peer in {row.peer for row in rows if row.op == target.op}
        assert target.ours in module("suites.trainers").WORKS[target.op][0]


@pytest.mark.parametrize("name", ["PEFT on bitsandbytes", "fastlora.patch(model)"])
@pytest.mark.parametrize("loss", [5.2, float("nan")])
def test_a_contender_with_another_loss_is_not_measured(name, loss):
    class Fake:
        def __init__(self, name):
            self.name = name

        def run(self, command):
            return 0.0, {"loss": loss, "gradients": None, "logits": None}

    context, trainers = a_context(), module("suites.trainers")
    exact = {trainers.EXACT_BNB: {"loss": 5.0}}
    assert not trainers._agrees(context, Fake(name), exact)
    where = context.failed if name.startswith("fastlora") else context.absent
    assert where == {f"{name}, a model": f"expected a loss of 5.0000, got {loss:.4f}"}


def test_a_contender_that_fails_is_left_out():
    class Fake:
        def __init__(self, name, answers):
            self.name, self.answers, self.calls = name, answers, 0

        def run(self, command):
            self.calls += 1
            if not self.answers:
                raise RuntimeError("out of tokens")
            return 0.5, None

    context, trainers = a_context(), module("suites.trainers")
    fakes = [Fake("PEFT on bitsandbytes", True), Fake("PEFT on bitsandbytes, eval mode", False)]
    able, first = trainers._able(context, fakes, "answer")
    assert (able, first) == (fakes[:1], [(0.5, None)])
    assert context.absent == {"PEFT on bitsandbytes, eval mode, a model": "out of tokens"}
    effort = module("_timing").Effort(2.0, 1, 9)
    assert trainers._in_turns(able, "answer", effort, first) == [[0.5] * 4]
    assert fakes[0].calls == 5


def test_a_process_says_what_went_wrong():
    parts = module("_trainers")
    sizes = parts.Sizes(64, 64, 1, 64, 8, rank=0, dtype=torch.float32)
    one = parts.Contender(parts.PEFT_DENSE, sizes, 1)
    with pytest.raises(RuntimeError, match="should be a positive integer"):
        one.run("check")
    one.close()
    with pytest.raises(OSError, match="closed"):
        one.run("check")


def test_widths_that_bitsandbytes_dequantises_wrongly_are_named():
    context = a_context()
    options = run_options("--suite", "trainers", "--quick", "--shapes", "100x64")
    cases = module("_cases").cases_of(module("run").plan_of(options))
    assert module("_cases").measure(cases, context) == []
    assert list(context.absent) == ["models of 100x64"]


def test_a_gpu_or_routes_have_no_models():
    trainers, plan = module("suites.trainers"), module("run").plan_of
    assert trainers.cases(plan(run_options("--device", "cuda"))) == []
    assert trainers.cases(plan(run_options("--ranks", "0"))) == []
