"""The targets on a CUDA device: set for an H200, NF4 with double-quantised absmax and an adapter of rank 16
that is on, bfloat16, as ratios within one run. A figure is the geometric mean over rows of x and layers."""

from __future__ import annotations

from _results import BITSANDBYTES, DENSE
from _target import EXTRA, FLOOR, MEMORY, ROOF, SPEED, WORST_ERROR, Target

NO_ADAPTER, PEFT = "fastlora, no adapter", "PEFT on bitsandbytes"

FEW, TENS, HUNDREDS = (1, 2, 4), (8, 16, 32, 64), (128, 256, 512, 1024)
MANY, MORE = (2048,), (4096, 8192)
LARGE = 14336 * 4096  # weights


def _span(m: tuple[int, ...]) -> str:
    return f"m={m[0]}" if len(m) == 1 else f"m={m[0]}-{m[-1]}"


def _forward(m: tuple[int, ...], least: float, reach: float | None, peer: str) -> Target:
    name = "dense bfloat16" if peer == DENSE else peer
    return Target(f"forward, {_span(m)}, over {name}", "linear", "forward", SPEED, least, reach, peer, m)


def _dx(m: tuple[int, ...], least: float) -> Target:
    work = f"dx, {_span(m)}, over bitsandbytes' backward"
    return Target(work, "backward", "dx", SPEED, least, 1.3, BITSANDBYTES, m)


def _adapter(m: tuple[int, ...], least: float) -> Target:
    work = f"adapter of rank 16 on top of the base, {_span(m)}"
    return Target(work, "linear", "forward", EXTRA, least, 2, NO_ADAPTER, m)


_STEP = "training step, m=4096"

TARGETS = (
    _forward(FEW, 1.3, None, BITSANDBYTES),
    _forward(FEW, 2.0, None, PEFT),
    Target(
        "forward, m=1-4, of the memory floor, 14336x4096 and larger",
        "linear", "forward", ROOF, 65, 80, m=FEW, least_weights=LARGE,
    ),
    _forward(TENS, 2.0, None, BITSANDBYTES),
    _forward(TENS[:3], 1.5, 2.5, DENSE),
    _forward(TENS[3:], 1.5, None, DENSE),
    _forward(HUNDREDS, 1.2, None, BITSANDBYTES),
    _forward(HUNDREDS, 0.75, 0.9, DENSE),
    _forward(MANY, 0.85, 0.97, DENSE),
    _forward(MORE, 0.92, 0.97, DENSE),
    _forward(MANY + MORE, 1.15, None, PEFT),
    _dx(FEW + TENS + HUNDREDS, 1.2),
    _dx(MANY + MORE, 1.0),
    Target(f"{_STEP}, over {PEFT}", "train", "training step", SPEED, 1.2, 1.4, PEFT, (4096,)),
    Target(
        f"{_STEP}, its peak beside that of {PEFT}",
        "memory", "peak of a training step", MEMORY, 1.0, None, PEFT, (4096,),
    ),
    _adapter(FEW + TENS, 10),
    _adapter(HUNDREDS + MANY + MORE, 5),
    Target(
        "64 rows, an adapter of rank 16 each, of their bytes at the copy's rate",
        "segmented", "term, an adapter a row", FLOOR, 2.0, 1.3, m=(64,),
    ),
    Target(
        "64 rows, an adapter of rank 16 each, over torch.bmm on gathered adapters",
        "segmented", "term, an adapter a row", SPEED, 3, None, "torch.bmm, gathered", (64,),
    ),
    Target(
        "layer, 4096 rows of 8 adapters, on top of one adapter",
        "segmented", "layer, 8 adapters", EXTRA, 8, 3, "fastlora, one adapter", (4096,),
    ),
    Target("error of forward, over dequantise + dense", "linear", "forward", WORST_ERROR, 1.0),
    Target("error of dx, over dequantise + dense", "backward", "dx", WORST_ERROR, 1.0),
)  # fmt: skip
