"""bench/: every suite at a tiny size, its files read back. Times are not looked at."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from bench_parts import BENCH, bench_on_path, module, run_options  # noqa: F401

import fastlora


@pytest.fixture(scope="module")
def results(tmp_path_factory, bench_on_path):  # noqa: F811
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
        if row.suite == "memory" or row.op.startswith("peak"):
            assert row.mib is not None
            assert row.mib >= 0
            continue
        assert row.p20_us <= row.p50_us <= row.p80_us
        if row.op != "quantize":
            assert row.arithmetic_error < (0.05 if row.suite == "trainers" else 0.02), row
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


def test_every_batch_of_many_adapters_is_measured(results):
    read, many = module("_results").read_json(results / "rows.json"), module("suites.segmented")
    rows = [row for row in read.rows if row.suite == "segmented"]
    wanted = {
        "fastlora",
        "fastlora, one adapter",
        "fastlora, equal ranks",
        "torch, a loop",
        "torch.bmm, gathered",
    }
    for op, work in many.WORKS.items():
        assert {(r.peer, r.m) for r in rows if r.op == op} == {
            (p, m) for p in work.names if p in wanted for m in (1, 17)
        }
    assert all(row.total_error < (0.2 if "layer" in row.op else 0.02) for row in rows)


def test_pefts_layer_takes_the_same_batch():
    problem, many = module("_problem").Problem(48, 64, 4, "float32"), module("_many")
    batch = many.Batch(problem, 6, (4, 4, 4))
    names = ("fastlora", many.PEFT_DENSE, many.PEFT_BNB)
    made, absent = many.make(many.LAYER, names, frozenset(module("peers").REGISTRY), batch)
    assert [one.name for one in made] == [name for name in names if name not in absent]
    for one in made:
        error = batch.errors(one.forward(), one)
        assert error.arithmetic < 1e-5, one.name
        assert error.total < (1e-5 if one.name == many.PEFT_DENSE else 0.2), one.name


def test_a_wrong_batch_has_an_error():
    problem, many = module("_problem").Problem(48, 64, 4, "float32"), module("_many")
    batch = many.Batch(problem, 6, (3, 9, 4))
    (term, loop), _ = many.make(many.TERM, ("fastlora", many.LOOP), frozenset({"dense", "fastlora"}), batch)
    assert batch.errors(term.forward(), term).arithmetic < 1e-5
    assert batch.errors(term.forward(), term).arithmetic == pytest.approx(1.0, rel=1e-3)  # it was added twice
    found = loop.step()
    assert batch.gradient_error(found[0], found[1:]) < 1e-5
    found[1][0] += 1.0
    assert batch.gradient_error(found[0], found[1:]) > 0.1
    gathered, absent = many.make(many.TERM, (many.GATHERED,), frozenset({"dense"}), batch)
    assert (gathered, absent) == ([], {many.GATHERED: "torch.bmm takes adapters of one rank"})


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
        (["--routes", "all"], "expected --device cuda with --routes"),
        (["--device", "cuda", "--routes", "scenic"], "expected some of decode, tile"),
        (["--device", "cuda", "--isa", "avx2"], "expected --device cpu with --isa"),
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
