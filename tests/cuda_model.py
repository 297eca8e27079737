"""The cost model of the CUDA kernels as the tables of docs/cuda_kernels.md.

    make cuda-model                  # prints them
    make cuda-model ARGS=--write     # puts them into docs/cuda_kernels.md

tests/_cuda_model.py says what is counted and what is assumed.
"""

from __future__ import annotations

import argparse

import _cuda_model as model
import _cuda_tables
from _cuda_model import GPUS, Gpu, Kernel
from tqdm import tqdm

BEGIN, END = "<!-- make cuda-model: begin -->", "<!-- make cuda-model: end -->"
SHAPES = ((4096, 4096), (14336, 4096))
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
WEIGHTS = 8192  # of which the first table speaks
LETTER = {"memory": "m", "tensor": "t", "issue": "i", "shared": "s"}


def devices() -> list[str]:
    """What is assumed of each."""
    lines = ["| | SMs | GHz | copy, TB/s | `mma`, FMAs a clock | `wgmma` | GEMM, TFLOP/s |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    for it in GPUS:
        rates = f"{it.copy:g} | {it.products} | {it.group_products or ''} | {it.gemm:g}"
        lines.append(f"| {it.name} | {it.processors} | {it.ghz:g} | {rates} |")
    return lines


def _step_cells(kernel: Kernel, gpu: Gpu) -> list[str]:
    one = model.step(kernel, gpu)
    if one is None:
        return [""] * 3
    part = WEIGHTS / (kernel.outer * one.depth)
    cells = {"tensor": one.tensor, "issue": one.issue, "shared": one.shared}
    return [f"**{part * v:.0f}**" if one.bound == name else f"{part * v:.0f}" for name, v in cells.items()]


def loops() -> list[str]:
    """Clocks of each kind for so many weights."""
    shown = [gpu for gpu in GPUS if gpu.name != "H200"]  # the H100's processors
    kinds = " | ".join(f"{gpu.name}: tensor | issue | shared" for gpu in shown)
    lines = [f"| kernel | rows | {kinds} |", "|---|--:|" + "--:|" * (3 * len(shown))]
    for kernel in tqdm(model.kernels(), desc="cuda-model", unit="kernel"):
        cells = [cell for gpu in shown for cell in _step_cells(kernel, gpu)]
        lines.append(f"| `{kernel.name}` | {kernel.columns} | {' | '.join(cells)} |")
    return lines


def _call_cell(gpu: Gpu, grad: bool, m: int, n: int, k: int) -> str:
    found = model.predict(gpu, grad, m, n, k)
    assert found is not None
    return f"{found.us:.1f} {found.route[0]}{LETTER[found.bound]}"


def calls(grad: bool) -> list[str]:
    """Microseconds of a call, its route and what bounds it, and of a dense product."""
    heads = " | ".join(f"{gpu.name} | dense" for gpu in GPUS)
    lines = [f"| {'dx' if grad else 'forward'} | m | MB | {heads} | measured |"]
    lines.append("|---|--:|--:|" + "--:|" * (2 * len(GPUS)) + "--:|")
    for n, k in SHAPES:
        for m in ROWS:
            cells = []
            for gpu in GPUS:
                cells += [_call_cell(gpu, grad, m, n, k), f"{model.dense_us(gpu, m, n, k):.1f}"]
            megabytes = model.moved_bytes(m, n, k) / 1e6
            lines.append(f"| {n} x {k} | {m} | {megabytes:.1f} | {' | '.join(cells)} | |")
    return lines


def text() -> str:
    return "\n".join([*devices(), "", *loops(), "", *calls(grad=False), "", *calls(grad=True)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/cuda_kernels.md")
    options = parser.parse_args()
    tables = text()
    print(tables)
    if options.write:
        _cuda_tables.replace(BEGIN, END, tables)


if __name__ == "__main__":
    main()
