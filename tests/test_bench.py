"""bench/: every suite at a tiny size, its files read back, absent contenders named, the targets' arithmetic.

Times are not looked at."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlora

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module", autouse=True)
def bench_on_path():
    """bench/ is a folder of scripts: its modules are found beside run.py."""
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def module(name):
    return importlib.import_module(name)


def run_options(*arguments):
    return module("_options").parse("", list(arguments))


def a_row(**changes):
    labels = {"suite": "linear", "op": "forward", "dtype": "bfloat16", "level": "avx2", "cache": "cold"}
    sizes = {"n": 4096, "k": 4096, "r": 16, "m": 1, "threads": 2}
    return module("_results").Row(**(labels | sizes | {"peer": "fastlora", "p50_us": 10.0} | changes))


@pytest.fixture(scope="module")
def results(tmp_path_factory, bench_on_path):
    """One quick run of everything, the slow libraries left out: they have the same adapters to satisfy."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = [
        "--quick",
        "--shapes",
        "128x192",
        "--rows",
        "1,17",
        "--ranks",
        "8",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    arguments += [
        "--peers",
        "dense,fastlora,bitsandbytes",
        "--machine",
        "here",
        "--save",
        str(folder),
    ]
    arguments += ["--json", str(folder / "rows.json")]
    threads = torch.get_num_threads()
    try:
        assert module("run").main(run_options(*arguments)) == 0
    finally:
        torch.set_num_threads(threads)
    return folder


def test_every_suite_has_rows_with_errors_and_rates(results):
    read = module("_results").read_json(results / "rows.json")
    assert {row.suite for row in read.rows} == set(module("_options").SUITES)
    for row in read.rows:
        if row.suite == "memory":
            assert row.mib is not None
            assert row.mib >= 0
            continue
        assert row.p20_us <= row.p50_us <= row.p80_us
        if row.op != "quantize":
            assert row.arithmetic_error < 0.02, row
        if row.suite in ("linear", "backward", "train"):
            assert row.total_error < (0.2 if "dense" not in row.peer else 0.02), row
            assert row.tflops > 0
    ours = [row for row in read.rows if row.peer == "fastlora" and row.suite in ("linear", "backward")]
    assert ours
    assert all(row.composite_error > 0 for row in ours)


def test_every_way_to_call_the_layer_is_in_the_overhead(results):
    read = module("_results").read_json(results / "rows.json")
    overhead = module("suites.overhead")
    names = [n for n in overhead.NAMES if n != overhead.DIRECT or fastlora.direct.AVAILABLE]
    assert [row.peer for row in read.rows if row.suite == "overhead"] == names


def test_csv_and_json_hold_the_same_rows(results):
    io = module("_results")
    from_csv, from_json = io.read_csv(results / "here.csv"), io.read_json(results / "rows.json")
    assert from_csv.rows == from_json.rows
    assert from_csv.about == from_json.about
    assert from_csv.absent == from_json.absent


def test_the_page_and_the_plots_are_written(results):
    page = (results / "here.md").read_text()
    for heading in ("## Targets", "## Geometric means", "### linear: forward, n 128, k 192, r 8"):
        assert heading in page
    assert "not measured" in page
    roofs, _ = module("_roofs").measure(1, quick=True)
    plots = {path.name for path in results.glob("*.png")}
    assert plots == {"here-speed.png"} | ({"here-roof.png"} if roofs else set())


def test_a_contender_that_cannot_be_had_is_named(monkeypatch):
    peers = module("peers")
    monkeypatch.setitem(peers.REGISTRY, "imagined", ("no_such_module", "Imagined"))
    found, absent = peers.find(["dense", "imagined"])
    assert [kind.name for kind in found] == ["dense"]
    assert "no_such_module" in absent["imagined"]


def test_a_contender_that_cannot_do_a_case_says_why():
    peers = module("peers")
    kinds, _ = peers.find(["dense", "dense + LoRA (PEFT)"])
    built, absent = peers.build(kinds, module("_problem").Problem(64, 64, 0, "float32"))
    assert [peer.name for peer in built] == ["dense"]
    assert absent == {"dense + LoRA (PEFT)": "PEFT has no adapter of rank 0"}


def test_a_library_that_fails_at_a_size_is_named_and_ours_is_not_forgiven():
    suites, peers = module("suites"), module("peers")
    kinds, _ = peers.find(["dense", "fastlora"])
    dense, ours = peers.build(kinds, module("_problem").Problem(64, 64, 4, "float32"))[0]
    context = suites.Context(None, module("_timing").Effort(), None, 1, "scalar", frozenset())

    def fail():
        raise AssertionError("expected rows of 32")

    able, results, _ = context.attempt([dense], lambda peer: fail)
    assert (able, results) == ([], [])
    assert context.absent == {"dense at 64x64": "expected rows of 32"}
    with pytest.raises(AssertionError, match="rows of 32"):
        context.attempt([ours], lambda peer: fail)


def test_errors_are_those_of_float64_on_the_sampled_elements():
    problem = module("_problem").Problem(40, 24, 4, "float32")

    class Exact:
        rank, coded = 4, True

        def __init__(self):
            self.problem = problem

        def stored(self):
            return module("_problem").sampled(problem, problem.weight)

    x = problem.activation(5)
    y = x.double() @ (problem.weight + 2.0 * problem.lora_b @ problem.lora_a).double().t()
    found = module("_problem").forward_errors(Exact(), x, y)
    assert found.arithmetic < 1e-6
    assert found.total == found.arithmetic
    assert 1e-4 < found.composite < 1e-2  # the weight rounded to bfloat16
    assert module("_problem").forward_errors(Exact(), x, 1.5 * y).arithmetic == pytest.approx(0.5, rel=1e-3)


def test_geometric_mean():
    mean = module("_results").geometric_mean
    assert mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(mean([]))


def test_targets_take_the_mean_over_the_five_shapes():
    targets = module("targets")
    rows = []
    for n, ours in ((4096, 10.0), (1024, 40.0), (3584, 1000.0)):  # the last shape is not one of the five
        k = n if n == 3584 else 4096
        rows += [a_row(n=n, k=k, p50_us=ours), a_row(n=n, k=k, peer="dense", p50_us=80.0)]
    target = targets.Target("t", "linear", "forward", targets.SPEED, 3.6, 5.0, "dense", 1)
    outcome = targets.evaluate(target, rows, "avx2")
    assert (outcome.figure, outcome.points) == (pytest.approx(4.0), 2)
    assert outcome.verdict == "hit"
    assert targets.evaluate(target, rows, "amx").verdict == "not measured"


@pytest.mark.parametrize(
    ("unit", "least", "changes", "figure", "verdict"),
    [
        ("ROOF", 70, {"roof_percent": 65.0}, 65.0, "missed"),
        ("FLOOR", 3, {"roof_percent": 50.0}, 2.0, "hit"),
        ("EXTRA", 5, {"p50_us": 84.0}, 5.0, "hit"),
        ("EXTRA", 5, {"p50_us": 88.0}, 10.0, "missed"),
        ("MICROSECONDS", 8, {"p50_us": 9.0}, 9.0, "missed"),
        ("MIB", 4, {"mib": 3.5}, 3.5, "hit"),
        ("WORST_ERROR", 1, {"arithmetic_error": 3e-3, "composite_error": 2e-3}, 1.5, "missed"),
    ],
)
def test_units_of_targets(unit, least, changes, figure, verdict):
    targets = module("targets")
    rows = [a_row(peer="dense", p50_us=80.0), a_row(**changes)]
    target = targets.Target("t", "linear", "forward", getattr(targets, unit), least, None, "dense", 1)
    outcome = targets.evaluate(target, rows, "avx2")
    assert outcome.figure == pytest.approx(figure)
    assert outcome.verdict == verdict


def test_slow_contenders_get_fewer_rounds():
    timing = module("_timing")
    effort = timing.Effort(seconds=1.0, least=3, most=25)
    assert [effort.rounds(seconds) for seconds in (1e-3, 0.1, 10.0)] == [25, 10, 3]
    calls = [0, 0]

    def count(which):
        calls[which] += 1

    both = [lambda: count(0), lambda: count(1)]
    times = timing.interleaved(both, timing.Effort(1.0, 2, 4), flush=lambda: None, first=[0.01, 10.0])
    assert [t.rounds for t in times] == [4, 2]
    assert calls == [5, 2]  # the fast one's first call is repeated before it is believed


def test_the_default_selection_measures_every_target():
    run, targets = module("run"), module("targets")
    cases = run.cases_of(run.plan_of(run_options()))
    for target in targets.TARGETS:
        measured = [c for c in cases if (c.suite, c.op, c.dtype) == (target.suite, target.op, target.dtype)]
        measured = [c for c in measured if target.m in (None, c.m)]
        assert measured, target.work
        if target.suite in ("linear", "backward", "train") and target.unit != targets.WORST_ERROR:
            if (target.dtype, target.m) != ("float32", 512):  # at the two smallest of the five only
                assert {(c.n, c.k) for c in measured} >= set(targets.FIVE), target.work
            five = [c for c in measured if (c.n, c.k) in targets.FIVE]
            assert all(not target.peer or target.peer in c.peers for c in five), target.work


def test_roofs_of_this_machine():
    roofs, why = module("_roofs").measure(1, quick=True)
    if roofs is None:
        pytest.skip(why)
    assert min(roofs.read_gbps, roofs.read_cached_gbps, roofs.copy_gbps, roofs.fma_tflops) > 0
    assert (roofs.bf16_tflops is not None) == (fastlora.current_isa() in ("avx512_bf16", "amx"))


def test_scratch_is_that_of_one_call():
    held = module("suites.memory").in_fresh_thread
    assert held(lambda: None, 1) == 0
    layer = fastlora.QLinear(512, 64, rank=4).eval()
    with torch.no_grad():
        assert held(lambda: layer(torch.ones(64, 512)), 1) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "speed"], "expected some of quantize, linear"),
        (["--shapes", "64"], "invalid"),
        (["--rows", "0"], "invalid"),
        (["--dtype", "int8"], "expected some of float32"),
        (["--ranks=-1"], "expected ranks of at least 0"),
    ],
)
def test_options_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run_options(*arguments)
    assert message in capsys.readouterr().err


def test_suites_may_be_repeated_or_listed():
    assert run_options("--suite", "train,linear", "--suite", "memory").suite == ("linear", "train", "memory")
    assert run_options().suite == run_options("--suite", "all").suite


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_refused(capsys):
    assert module("run").main(run_options("--device", "cuda")) == 2
    assert "expected a CUDA device" in capsys.readouterr().err


@pytest.mark.skipif("avx2" not in fastlora.available_isas(), reason="this machine cannot run level avx2")
def test_the_avx2_level_caps_the_dense_libraries(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, str(BENCH / "run.py"), "--isa", "avx2", "--suite", "linear", "--quick"]
    command += [
        "--peers",
        "dense,fastlora",
        "--shapes",
        "64x64",
        "--rows",
        "1",
        "--threads",
        "1",
        "--json",
        str(file),
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("FASTLORA_ISA", "ONEDNN_MAX_CPU_ISA")}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    read = module("_results").read_json(file)
    assert {row.level for row in read.rows} == {"avx2"}
    assert read.about["dense libraries"] == "ONEDNN_MAX_CPU_ISA=AVX2"
