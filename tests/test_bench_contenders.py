"""bench/: contenders that cannot be had or fail, cases that fail, and how often they are timed."""

from __future__ import annotations

import threading

import pytest
from bench_parts import a_case, a_context, bench_on_path, module, one_row  # noqa: F401


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


def test_a_contender_that_fails_at_a_size_is_named_and_ours_is_a_failure():
    peers, context, case = module("peers"), a_context(), a_case(None)
    kinds, _ = peers.find(["dense", "fastlora"])
    both, _ = peers.build(kinds, module("_problem").Problem(64, 64, 4, "float32"))

    def fail():
        raise AssertionError("expected rows of 32")

    able, results, _ = context.attempt(case, both, lambda peer: fail)
    assert (able, results) == ([], [])
    assert context.absent == {"dense at 64x64": "expected rows of 32"}
    assert context.failed == {"fastlora, forward 64x64 m 3": "expected rows of 32"}


def test_a_library_that_cannot_be_built_is_named(monkeypatch):
    peers = module("peers")
    kinds, _ = peers.find(["dense", "fastlora"])

    def fail(self, problem):
        raise OSError("no such file\nand more")

    problem = module("_problem").Problem(64, 64, 4, "float32")
    monkeypatch.setattr(kinds[0], "build", fail)
    built, absent = peers.build(kinds, problem)
    assert [peer.name for peer in built] == ["fastlora"]
    assert absent == {"dense": "no such file"}
    monkeypatch.setattr(kinds[1], "make", fail)
    with pytest.raises(OSError, match="no such file"):
        peers.build(kinds, module("_problem").Problem(64, 64, 4, "float32"))


def test_a_case_that_fails_is_named_and_the_others_go_on(capsys):
    measure, context = module("_cases").measure, a_context()

    def fail(case, context, problem):
        raise RuntimeError("launch failed")

    cases = [a_case(one_row), a_case(fail, m=4), a_case(one_row, m=5)]
    assert [row.m for row in measure(cases, context)] == [3, 5]
    assert context.failed == {"forward 64x64 m 4": "launch failed"}
    assert "launch failed" in capsys.readouterr().err


def test_nothing_is_measured_on_a_lost_device():
    class Lost(module("_device").Device):
        def usable(self):
            return False

    def fail(case, context, problem):
        raise RuntimeError("an illegal memory access")

    context = a_context(device=Lost())
    rows = module("_cases").measure([a_case(one_row), a_case(fail, m=4), a_case(one_row, m=5)], context)
    assert [row.m for row in rows] == [3]
    assert context.failed["all that comes after"] == "the device is lost"


def test_a_case_that_hangs_ends_the_run_with_what_there_is():
    class Impatient(module("_device").Device):
        patience = 0.05

    given_up = []
    stop = threading.Event()

    def give_up(rows):
        given_up.append([row.m for row in rows])
        stop.set()

    def hang(case, context, problem):
        assert stop.wait(60)
        return []

    context = a_context(device=Impatient())
    module("_cases").measure([a_case(one_row), a_case(hang, m=4)], context, give_up=give_up)
    assert given_up == [[3]]
    assert context.failed == {"forward 64x64 m 4": "had not ended after 0.05 s"}


def test_a_limit_ends_the_run_and_says_so():
    context = a_context()
    assert module("_cases").measure([a_case(one_row), a_case(one_row, m=4)], context, limit=0.0) == []
    assert context.absent == {"2 of 2 cases": "not begun within 0 s"}


def test_slow_contenders_get_fewer_rounds():
    timing = module("_timing")
    effort = timing.Effort(seconds=1.0, least=3, most=25)
    assert [effort.rounds(seconds) for seconds in (1e-3, 0.1, 10.0)] == [25, 10, 3]
    calls = [0, 0]

    def count(which):
        calls[which] += 1

    both = [lambda: count(0), lambda: count(1)]
    waits = []
    clock = timing.Clock(cold=False, wait=lambda: waits.append(1))
    clock.cold, clock._flush = True, lambda: None
    times = timing.interleaved(both, timing.Effort(1.0, 2, 4), clock, first=[0.01, 10.0])
    assert [t.rounds for t in times] == [4, 2]
    assert calls == [5, 2]  # the fast one's first call is repeated before it is believed
    assert len(waits) == 13  # after every call, and after what goes before a timed one
