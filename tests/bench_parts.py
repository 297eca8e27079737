"""What the tests of bench/ share: a folder of scripts, whose modules are found beside run.py."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module", autouse=True)
def bench_on_path():
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


def a_context(**changes):
    timing = module("_timing")
    fields = {
        "device": module("_device").Device(),
        "clock": timing.Clock(cold=False),
        "roofs": None,
        "effort": timing.Effort(0.01, 1, 1),
        "threads": 1,
        "level": "scalar",
        "wanted": frozenset(module("peers").REGISTRY),
    }
    return module("suites").Context(**(fields | changes))


def a_case(run, **changes):
    fields = {"suite": "linear", "op": "forward", "n": 64, "k": 64, "r": 4, "m": 3, "dtype": "float32"}
    return module("suites").Case(**(fields | {"peers": ("dense", "fastlora"), "run": run} | changes))


def one_row(case, context, problem):
    """What a case may run."""
    return [a_row(n=case.n, k=case.k, m=case.m)]
