"""bench/: the targets' arithmetic, and that what is measured by default is what they need."""

from __future__ import annotations

import math

import pytest
from bench_parts import a_row, bench_on_path, module, run_options  # noqa: F401


def test_geometric_mean():
    mean = module("_results").geometric_mean
    assert mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(mean([]))


def test_targets_take_the_mean_over_the_five_shapes():
    targets = module("_target")
    rows = []
    for n, ours in ((4096, 10.0), (1024, 40.0), (3584, 1000.0)):  # the last shape is not one of the five
        k = n if n == 3584 else 4096
        rows += [a_row(n=n, k=k, p50_us=ours), a_row(n=n, k=k, peer="dense", p50_us=80.0)]
    target = targets.Target("t", "linear", "forward", targets.SPEED, 3.6, 5.0, "dense", (1,))
    five = module("_sizes").FIVE
    outcome = targets.evaluate(target, rows, "avx2", five)
    assert (outcome.figure, outcome.points) == (pytest.approx(4.0), 2)
    assert (outcome.worst, outcome.where) == (pytest.approx(2.0), "1024x4096, m 1")
    assert outcome.verdict == "hit"
    assert targets.evaluate(target, rows, "amx", five).verdict == "not measured"


@pytest.mark.parametrize(
    ("unit", "least", "changes", "figure", "verdict"),
    [
        ("ROOF", 70, {"roof_percent": 65.0}, 65.0, "missed"),
        ("FLOOR", 3, {"roof_percent": 50.0}, 2.0, "hit"),
        ("EXTRA", 5, {"p50_us": 84.0}, 5.0, "hit"),
        ("EXTRA", 5, {"p50_us": 88.0}, 10.0, "missed"),
        ("MICROSECONDS", 8, {"p50_us": 9.0}, 9.0, "missed"),
        ("MIB", 4, {"mib": 3.5}, 3.5, "hit"),
        ("MEMORY", 1, {"mib": 3.0}, 1.5, "missed"),
        ("WORST_ERROR", 1, {"arithmetic_error": 3e-3, "composite_error": 2e-3}, 1.5, "missed"),
    ],
)
def test_units_of_targets(unit, least, changes, figure, verdict):
    targets = module("_target")
    rows = [a_row(peer="dense", p50_us=80.0, mib=2.0), a_row(**changes)]
    target = targets.Target("t", "linear", "forward", getattr(targets, unit), least, None, "dense", (1,))
    outcome = targets.evaluate(target, rows, "avx2", ())
    assert outcome.figure == pytest.approx(figure)
    assert outcome.verdict == verdict


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_default_selection_measures_every_target(device):
    shapes = set(module("_sizes").targeted(device))
    cases = module("_cases").cases_of(module("run").plan_of(run_options("--device", device)))
    for target in module("targets").of_device(device):
        measured = [c for c in cases if (c.suite, c.op, c.dtype) == (target.suite, target.op, target.dtype)]
        assert {c.m for c in measured} >= set(target.m), target.work
        measured = [c for c in measured if not target.m or c.m in target.m]
        assert measured, target.work
        if target.suite in ("linear", "backward", "train") and target.unit != module("_target").WORST_ERROR:
            if (target.dtype, target.m) != ("float32", (512,)):  # at the two smallest of the five only
                for m in target.m:
                    assert {(c.n, c.k) for c in measured if c.m == m} >= shapes, target.work
            compared = [c for c in measured if (c.n, c.k) in shapes]
            assert all(not target.peer or target.peer in c.peers for c in compared), target.work


def test_a_result_that_is_no_number_is_a_missed_target():
    targets = module("_target")
    target = targets.Target("t", "linear", "forward", targets.WORST_ERROR, 1.0)
    errors = (1e-3, math.nan, 2e-3)
    rows = [a_row(m=m, arithmetic_error=error, composite_error=1e-2) for m, error in enumerate(errors, 1)]
    outcome = targets.evaluate(target, rows, "avx2", ())
    assert outcome.verdict == "missed"
    assert outcome.where == "4096x4096, m 2"


def test_a_target_counts_its_rows_and_large_layers_only():
    targets = module("_target")
    target = targets.Target(
        "t", "linear", "forward", targets.ROOF, 65, 80, m=(1, 2), least_weights=14336 * 4096
    )
    percent = {(4096, 4096, 1): 10.0, (14336, 4096, 1): 60.0, (4096, 14336, 2): 90.0, (14336, 4096, 4): 1.0}
    rows = [a_row(n=n, k=k, m=m, roof_percent=value) for (n, k, m), value in percent.items()]
    outcome = targets.evaluate(target, rows, "avx2", ((4096, 4096), (14336, 4096), (4096, 14336)))
    assert outcome.figure == pytest.approx(math.sqrt(60 * 90))
    assert (outcome.worst, outcome.points, outcome.verdict) == (60.0, 2, "hit")


def test_the_device_says_which_targets_count():
    targets, io = module("targets"), module("_results")
    row = a_row(level="sm_90a", m=64)
    others = [a_row(level="sm_90a", m=64, peer=peer, p50_us=25.0) for peer in ("bitsandbytes", "dense")]
    about = {"machine": "a GPU", "level": "sm_90a"}
    report = targets.report(io.Results(about | {"device": "cuda"}, {}, [row, *others]))
    line = "forward, m=64, over dense bfloat16 | 1.5 x |  | 2.50 | 2.50 (4096x4096, m 64) | 1 | hit"
    assert any(line in one for one in report)
    assert report[-2] == "2 of 2 measured targets hit, 20 not measured."
    on_cpu = targets.report(io.Results(about, {}, [row, *others]))
    assert any("forward, bfloat16 x, m=64, over dense bfloat16 | 1.5 x | 2 | 2.50" in line for line in on_cpu)
