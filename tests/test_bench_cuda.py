"""bench/run.py --device cuda, whole, on the emulated kernels: what is measured, by which route, and what is
written. Times are the emulator's, and mean nothing."""

from __future__ import annotations

import dataclasses
import sys

import devices
import pytest
import torch
from bench_parts import a_row, bench_on_path, module, run_options  # noqa: F401

import fastlora

N, K = 128, 192


@pytest.fixture(scope="module")
def device_kind(bench_on_path):  # noqa: F811
    """The CUDA device with everything replaced that asks torch for one."""
    own, timing, roofs = module("_device"), module("_timing"), module("_roofs_cuda")

    class Emulated(own.Cuda):
        where = "cpu"
        kernels = devices._emulator

        def refuse(self):
            return None

        def clock(self, cold):
            return timing.Clock(cold=False)

        def host_clock(self):
            return timing.Clock(cold=False)

        def roofs(self, *, quick):
            rates = {"bfloat16": 800.0, "float16": 800.0, "float32": 50.0}
            return roofs.CudaRoofs(4000.0, 4000.0, rates), ""

        def level(self):
            return "sm_90a"

        def describe(self):
            return {"machine": "An emulated GPU", "device": "cuda", "level": self.level()}

        def name(self):
            return "an-emulated-gpu"

        def peak_growth(self, call):
            call()
            return 3 * 2**20

        def usable(self):
            return True

    return Emulated


def measured(folder, device_kind, *arguments):
    common = ["--device", "cuda", "--quick", "--rounds", "1", "--ranks", "8", "--threads", "1"]
    common += ["--json", str(folder / "rows.json"), "--save", str(folder)]
    module("peers").find(module("peers").REGISTRY)  # imports what would look at the ops that are replaced
    with pytest.MonkeyPatch.context() as patch, devices.device("cuda_emulated"):
        devices._emulator.set_traits(90)
        torch.ops.fastlora.nf4_linear.default = torch.ops.fastlora.nf4_linear
        patch.setitem(module("_device").KINDS, "cuda", device_kind)
        threads = torch.get_num_threads()
        try:
            status = module("run").main(run_options(*common, *arguments))
        finally:
            torch.set_num_threads(threads)
    return status, module("_results").read_json(folder / "rows.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory, device_kind):
    folder = tmp_path_factory.mktemp("cuda")
    return folder, *measured(folder, device_kind, "--shapes", f"{N}x{K}", "--rows", "1,24")


def test_every_suite_is_measured_with_the_devices_contenders(run):
    _, status, results = run
    assert status == 0, results.absent
    assert {row.suite for row in results.rows} == set(module("_options").SUITES) - {"trainers"}
    assert {row.level for row in results.rows} == {"sm_90a"}
    forward = {row.peer for row in results.rows if row.op == "forward"}
    assert forward >= {"dense", "bitsandbytes", "PEFT on bitsandbytes", "fastlora", "fastlora, no adapter"}
    assert not {"bitsandbytes, training mode", "bitsandbytes, eval mode"} & forward
    assert {row.peer for row in results.rows if row.op == "dx"} == {"dense", "bitsandbytes", "fastlora"}
    overhead = {row.peer for row in results.rows if row.suite == "overhead"}
    assert overhead == {"nn.Linear", "QLinear, rank 0", "QLinear", "torch.ops.fastlora.nf4_linear"}
    assert {row.op for row in results.rows if row.suite == "quantize"} == {"quantize", "dequantize"}


def test_results_are_right_and_held_against_the_devices_roofs(run):
    _, _, results = run
    layers = [row for row in results.rows if row.suite in ("linear", "backward", "train")]
    assert {row.roof for row in layers} == {"copy"}  # a layer so small multiplies in no time
    for row in layers:
        assert row.roof_percent > 0
        assert row.arithmetic_error < 0.02, row
    held = {row.op: row.mib for row in results.rows if row.suite == "memory" and row.peer == "fastlora"}
    assert held["peak of a training step"] == 3.0
    assert held["scratch of a call"] == pytest.approx(3.0 - min(N, K) * 2 * 24 / 2**20, abs=1e-3)


def test_a_row_says_which_kernel_served_it(run):
    folder, _, results = run
    of = {(r.op, r.m): r.route for r in results.rows if r.peer == "fastlora" and r.suite != "memory"}
    assert of[("forward", 1)].startswith("decode ")
    assert of[("forward", 24)].startswith(("warpgroup ", "tile "))
    assert of[("training step", 24)] == f"{of[('forward', 24)]} + {of[('dx', 24)]}"
    assert all(not row.route for row in results.rows if not row.peer.startswith("fastlora"))
    assert f"| {of[('forward', 1)]} |" in (folder / "an-emulated-gpu.md").read_text()
    again = module("_results").read_csv(folder / "an-emulated-gpu.csv")
    assert again.rows == results.rows


def test_the_page_has_the_devices_targets(run):
    folder, _, _ = run
    page = (folder / "an-emulated-gpu.md").read_text()
    assert "forward, m=1-4, of the memory floor" in page
    assert "## Routes" not in page
    plots = {path.name for path in folder.glob("*.png")}
    assert plots == {"an-emulated-gpu-speed.png", "an-emulated-gpu-roof.png"}


def test_the_results_fit_readmes_table(run, monkeypatch):
    folder, _, results = run
    readme_table, io = module("readme_table"), module("_results")
    about = results.about | {"torch": "2", "bitsandbytes": "0"}
    io.write_csv(folder / "bench" / "results" / "gpu.csv", dataclasses.replace(results, about=about))
    monkeypatch.setattr(readme_table, "ROOT", folder)
    table = readme_table.table("gpu")
    ours = next(r for r in results.rows if (r.peer, r.op, r.m) == ("fastlora", "forward", 1))
    assert "Median us of one 128 x 192 layer" in table
    assert f" {ours.p50_us:.1f} |" in table
    assert "An emulated GPU, level `sm_90a`, torch 2" in table


@pytest.fixture(scope="module")
def by_route(tmp_path_factory, device_kind):
    folder = tmp_path_factory.mktemp("routes")
    return folder, *measured(folder, device_kind, "--routes", "all", "--shapes", f"{N}x{K}", "--rows", "4,24")


def test_every_route_that_can_take_a_call_is_measured(by_route):
    _, status, results = by_route
    assert status == 0, results.absent
    taken = {}
    for row in results.rows:
        taken.setdefault((row.op, row.m), {})[row.peer] = row.route.split(" ")[0]
    ways = {f"fastlora, by {route}": route for route in ("decode", "tile", "warpgroup", "dense")}
    assert set(taken) == {("forward", 4), ("forward", 24), ("dx", 4), ("dx", 24)}
    for (op, m), found in taken.items():
        chosen = found.pop("fastlora")
        few = op == "forward" and m == 4
        assert found == {peer: way for peer, way in ways.items() if few or way != "decode"}
        assert chosen in found.values()


def test_the_routes_asked_for_are_the_ones_that_ran(device_kind, monkeypatch):
    """By the names of the kernels' own functions, as the device is given them."""
    peers, problem = module("peers"), module("_problem").Problem(64, 64, 8, "bfloat16")
    asked = []
    original = devices.EmulatedDevice.ask

    def ask(self, kernel, inputs, outputs, *numbers):
        if kernel == "nf4_linear":
            asked.append(numbers[-1])
        return original(self, kernel, inputs, outputs, *numbers)

    with devices.device("cuda_emulated"):
        devices._emulator.set_traits(90)
        monkeypatch.setattr(devices.EmulatedDevice, "ask", ask)
        kinds, _ = peers.find(peers.ROUTES)
        for peer in peers.build(kinds, problem)[0]:
            peer.forward(problem.activation(3))
    codes = fastlora.cuda_linear.ROUTES
    assert asked == [codes["decode"], codes["tile"], codes["warpgroup"]]  # dense has no kernel


def test_the_table_of_routes_is_written(by_route):
    folder, _, _ = by_route
    page = (folder / "an-emulated-gpu-routes.md").read_text()
    assert "| work | n x k | m | decode | tile | warpgroup | dense | chosen | fastest | loss |" in page
    assert page.count(f"| forward, bfloat16, r 8 | {N}x{K} |") == 2
    assert "dx, bfloat16, r 8: the choice takes" in page
    assert not list(folder.glob("*.png"))


def test_the_loss_is_the_chosen_route_over_the_fastest():
    times = {"decode": 10.0, "tile": 20.0, "dense": 80.0}
    rows = [a_row(peer=f"fastlora, by {route}", p50_us=t, route=route) for route, t in times.items()]
    rows.append(a_row(p50_us=21.0, route="tile 8/2"))
    rows += [dataclasses.replace(row, m=64, p50_us=5.0) for row in rows]
    routes = module("_routes")
    slow, even = routes.compare(rows)
    assert (slow.chosen, slow.fastest, slow.loss, slow.m) == ("tile", "decode", 2.0, 1)
    assert even.loss == 1.0
    table = "\n".join(routes.table(rows))
    assert "| 1 | 10.0 | 20.0 |  | 80.0 | tile | **decode** | 2.00 |" in table
    assert "41.4 % longer" in table
    assert "over 2 sizes, over 2 % longer at 1 of them, 100 % at the worst" in table
    assert routes.table([a_row()]) == []


def test_other_bits_than_the_cpus_are_a_failure():
    same_bits, dense = module("suites.quantize").same_bits, torch.randn(64, 128)
    same_bits(dense, fastlora.quantize_nf4(dense))
    same_bits(dense, fastlora.quantize_nf4(dense, double_quant=False))
    other = fastlora.quantize_nf4(dense)
    other.packed[3, 5] ^= 1
    with pytest.raises(AssertionError, match="bits of the quantised weight"):
        same_bits(dense, other)


def test_what_is_packed_for_a_cpu_is_absent_on_a_device():
    peers = module("peers")
    kinds, _ = peers.find(["torchao int4"])
    if not kinds:
        pytest.skip("torchao is not installed")
    problem = module("_problem").Problem(64, 64, 8, "bfloat16")
    problem.device = "cuda"
    built, absent = peers.build(kinds, problem)
    assert (built, absent) == ([], {"torchao int4": "this tensor is packed for torch's CPU kernel"})


def test_one_call_is_profiled_after_some_like_it(device_kind, monkeypatch, capsys):
    calls, events = [], []
    monkeypatch.setattr(module("_device"), "Cuda", device_kind)
    monkeypatch.setattr(sys, "argv", ["one_call.py", "dx", f"{N}x{K}", "5", "--route", "tile"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: events.append(len(calls)))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: events.append(len(calls)))
    # Undone before the device, which puts the ops themselves back.
    with devices.device("cuda_emulated"), pytest.MonkeyPatch.context() as inner:
        op = torch.ops.fastlora.nf4_linear_grad_input
        inner.setattr(
            torch.ops.fastlora, "nf4_linear_grad_input", lambda *args: (calls.append(1), op(*args))[1]
        )
        module("one_call").main()
    assert events == [3, 4]
    assert capsys.readouterr().out.startswith(f"dx {N}x{K} m 5: tile ")


@pytest.mark.parametrize("lacking", ["device", "kernels"])
def test_a_machine_that_cannot_is_refused(lacking, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: lacking != "device")
    monkeypatch.setattr(fastlora._C, "cuda_built", lacking != "kernels")
    assert module("run").main(run_options("--device", "cuda")) == 2
    want = {"device": "expected a CUDA device", "kernels": "expected a build with CUDA kernels"}
    assert want[lacking] in capsys.readouterr().err
