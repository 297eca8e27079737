"""Which kernels a layer takes on a device: csrc/cuda/nf4_linear_plan.cu, asked without a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from fastlora import cuda_linear
from fastlora.checks import DTYPE_CODE

_emulator = pytest.importorskip("fastlora._emulator", reason="this build holds no emulator")
from _launches import launches_on  # noqa: E402
from _occupancy import PROCESSORS  # noqa: E402

ROWS = (1, 2, 5, 8, 9, 16, 17, 32, 64, 65, 128, 200, 512, 1024, 4096)
COLUMNS = {
    "dense": {0},
    "decode": {16, 32},
    "tile": {1, 2, 4, 8, 12},
    "warpgroup": {16, 32, 64, 128, 256},
}
CAPABILITIES = (80, 86, 89, 90, 100, 103, 120)


class Plan(NamedTuple):
    route: str
    columns: int
    splits: int


@pytest.fixture(autouse=True)
def usual_traits() -> Iterator[None]:
    yield
    _emulator.set_traits()


def plan(
    capability: int, m: int, n: int = 4096, k: int = 4096, *, grad: bool = False, blocksize: int = 64,
    dtype: torch.dtype = torch.bfloat16, route: str = "auto", processors: int = 132,
) -> Plan:  # fmt: skip
    _emulator.set_traits(capability, processors, block_clocks=2500)
    code, columns, splits = _emulator.nf4_linear_plan(
        grad, m, n, k, 16, blocksize, DTYPE_CODE[dtype], cuda_linear.ROUTES[route]
    )
    names = {value: name for name, value in cuda_linear.ROUTES.items()}
    return Plan(names[code], columns, splits)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_plan_is_one_that_there_are_kernels_for(capability: int, grad: bool) -> None:
    for n, k in ((4096, 4096), (14336, 4096), (4096, 14336), (72, 1024), (40, 72)):
        for m in ROWS:
            for blocksize in (32, 64, 4096):
                made = plan(capability, m, n, k, grad=grad, blocksize=blocksize)
                assert made.columns in COLUMNS[made.route], made
                assert 1 <= made.splits <= 16
                assert made.route != "decode" or (not grad and m <= 8 and made.splits == 1)
                assert made.route != "warpgroup" or capability == 90


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_more_rows_never_lead_back_from_the_dense_route(capability: int, grad: bool) -> None:
    routes = [plan(capability, m, grad=grad).route for m in range(1, 4096, 7)]
    fused = sum(route != "dense" for route in routes)
    assert 64 / 7 < fused < len(routes)
    assert set(routes[fused:]) == {"dense"}
    assert routes[:2] == (["decode"] * 2 if not grad else ["tile"] * 2)


def test_what_no_kernel_takes_is_left_to_torch() -> None:
    assert plan(80, 4, dtype=torch.float32).route == "dense"
    assert plan(75, 4).route == "dense"
    assert plan(80, 4, k=0).route == "dense"
    assert plan(80, 0).route == "dense"


def test_a_route_that_is_asked_for_is_taken_where_it_can_be() -> None:
    assert plan(90, 4, route="warpgroup").route == "warpgroup"
    assert plan(90, 4096, route="tile").route == "tile"
    assert plan(90, 4, route="dense").route == "dense"
    for unable in (
        {"capability": 80, "m": 4, "route": "warpgroup"},
        {"capability": 90, "m": 4, "route": "warpgroup", "k": 4100},  # blocks straddle rows
        {"capability": 90, "m": 9, "route": "decode"},
        {"capability": 90, "m": 4, "route": "decode", "grad": True},
        {"capability": 90, "m": 4, "route": "decode", "blocksize": 32},
    ):
        asked, usual = plan(**unable), plan(**(unable | {"route": "auto"}))
        assert asked == usual
        assert asked.route != unable["route"]


def test_only_a_product_that_leaves_processors_idle_is_split() -> None:
    for capability in (80, 90):
        for m in (9, 64):
            assert plan(capability, m, n=128, k=8192).splits > 4
            assert plan(capability, m, n=128 * 132, k=8192).splits == 1


def test_a_block_has_the_shared_memory_that_it_asks_for() -> None:
    """Blocks of 32 weights need the most, and devices of 86, 89 and 120 have the least."""
    for arch, limits in PROCESSORS.items():
        asked = [(it.shared, it.kernel) for kernel in launches_on(arch).values() for it in kernel]
        assert any("kWeights" in kernel for _, kernel in asked)
        assert max(asked)[0] <= limits.block_shared << 10, (arch, max(asked))
