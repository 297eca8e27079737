"""What a call costs the processor beside the arithmetic: a 64 x 64 layer, inference, one row, everything in
cache. On a CUDA device that is the time until the launches are made; the device is waited for outside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from _problem import Problem, relative
from _results import Row
from _timing import Effort, interleaved
from torch import Tensor, nn

from fastlora import _C, QLinear, direct, isa
from fastlora.checks import DTYPE_CODE
from suites import Case, Context, Plan

SIZE = 64
CALLS = 50  # a timed sample: long for the clock, short for disturbances and for a device's queue of launches
EFFORT = Effort(seconds=0.2, least=10, most=400)
LINEAR, RANK_0, LAYER = "nn.Linear", "QLinear, rank 0", "QLinear"
OP, DIRECT, BINDING = "torch.ops.fastlora.nf4_linear", "fastlora.direct.linear", "_C.nf4_linear"
NAMES = (LINEAR, RANK_0, LAYER, OP, DIRECT, BINDING)
CUDA_NAMES = NAMES[:4]


def cases(plan: Plan) -> list[Case]:
    return [
        Case("overhead", "call", SIZE, SIZE, r, 1, dtype, CUDA_NAMES if plan.device == "cuda" else NAMES, run)
        for dtype in plan.kinds(("bfloat16",))
        for r in plan.ranks
        if r
    ]


def run(case: Case, context: Context, problem: Problem) -> list[Row]:
    x = problem.activation(case.m)
    with torch.inference_mode():
        calls = {name: made for name, made in _calls(problem, x).items() if name in case.peers}
        found = [(name, call, call(), weight) for name, (call, weight) in calls.items()]
        found = [one for one in found if one[2] is not None]  # the direct call, where torch is too old for it
        errors = [relative(y, x.double() @ weight.t()) for _, _, y, weight in found]
        many = [partial(_many, call) for _, call, _, _ in found]
        effort, clock = context.effort, context.device.host_clock()
        effort = effort if effort.most < EFFORT.least else EFFORT
        times = interleaved(many, effort, clock, [clock.once(call)[1] for call in many])
    return [
        Row(
            **case.labels(),
            level=context.level,
            threads=context.threads,
            cache="warm",
            peer=name,
            rounds=t.rounds,
            p20_us=1e6 * t.p20 / CALLS,
            p50_us=1e6 * t.p50 / CALLS,
            p80_us=1e6 * t.p80 / CALLS,
            arithmetic_error=error,
        )
        for (name, *_), t, error in zip(found, times, errors, strict=True)
    ]


def _many(call: Callable[[], object]) -> None:
    for _ in range(CALLS):
        call()


def _calls(problem: Problem, x: Tensor) -> dict[str, tuple[Callable[[], Tensor | None], Tensor]]:
    """By name, each with the float64 weight that its result stands for."""
    dense = nn.Linear(SIZE, SIZE, bias=False, dtype=problem.kind, device=problem.device)
    plain = QLinear.from_linear(dense, rank=0).eval()
    layer = QLinear.from_linear(dense, rank=problem.r, adapter_dtype=problem.kind).eval()
    nn.init.normal_(layer.lora_B, std=0.1)
    parts, adapter = (layer.weight, layer.weight_scales, layer.weight_nested), (layer.lora_A, layer.lora_B)
    u, y = x.new_empty(x.shape[0], problem.r), torch.empty_like(x)
    code = DTYPE_CODE[problem.kind]
    addresses = (
        x.data_ptr(), *(part.data_ptr() for part in parts), 0, layer.lora_A.data_ptr(),
        layer.lora_B.data_ptr(), 0, u.data_ptr(), y.data_ptr(), x.shape[0], SIZE, SIZE, problem.r,
        layer.blocksize, 0, 0, layer.scaling, code, code, torch.get_num_threads(), isa.level(),
    )  # fmt: skip
    op = torch.ops.fastlora.nf4_linear.default

    def binding(kept: tuple = (layer, u)) -> Tensor:  # a CPU's; an address keeps nothing alive
        _C.nf4_linear(*addresses)
        return y

    with torch.no_grad():
        base = layer.dequantize(torch.float32).double()
        whole = base + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    calls = (
        (partial(dense, x), dense.weight.detach().double()),
        (partial(plain, x), base),
        (partial(layer, x), whole),
        (partial(op, x, *parts, layer.blocksize, None, *adapter, layer.scaling), whole),
        (partial(direct.linear, x, layer.packed_weight(), None, *adapter, layer.scaling), whole),
        (binding, whole),
    )
    return dict(zip(NAMES, calls, strict=True))
