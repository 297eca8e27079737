"""Measure the CUDA kernels on this machine's GPU: quantise and dequantise, beside bitsandbytes and a copy.

    python bench/gpu.py --out bench/results

Writes <device>.csv and <device>.md there. Needs a CUDA device and a build with CUDA kernels. Contenders take
turns, every call is timed by CUDA events after the L2 cache was filled with something else; results are
checked bit for bit against the CPU first.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from _machine import commit, slug
from torch import Tensor
from tqdm import tqdm

import fastlora

SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))
COLUMNS = ("op", "n", "k", "dtype", "contender", "us_p50", "us_p20", "us_p80", "gbps", "of_copy_rate")


def bitsandbytes_calls(weight: Tensor) -> dict[str, Callable[[], object]]:
    try:
        import bitsandbytes.functional as f
    except ImportError:
        print("bitsandbytes is not installed: not measured", file=sys.stderr)
        return {}
    packed, state = f.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return {
        "quantize": lambda: f.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4"),
        "dequantize": lambda: f.dequantize_4bit(packed, state),
    }


def timed(calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Microseconds of every call, in turns."""
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    for call in calls:
        for _ in range(3):
            call()
    pairs: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, kept in zip(calls, pairs, strict=True):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            kept.append((begin, end))
    torch.cuda.synchronize()
    return [[1e3 * begin.elapsed_time(end) for begin, end in kept] for kept in pairs]


def measure(n: int, k: int, dtype: torch.dtype, rounds: int) -> list[dict[str, object]]:
    weight = torch.randn(n, k, device="cuda").to(dtype)
    q = fastlora.quantize_nf4(weight)
    if n * k <= 2**24:
        on_cpu = fastlora.quantize_nf4(weight.cpu())
        assert q.to("cpu") == on_cpu, "the device's bits differ from the CPU's"
        assert torch.equal(q.dequantize().cpu(), on_cpu.dequantize())
    source = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ours = {
        "quantize": lambda: fastlora.quantize_nf4(weight, check_finite=False),
        "dequantize": q.dequantize,
    }
    theirs = bitsandbytes_calls(weight)
    labels = [("copy", "torch")]
    calls: list[Callable[[], object]] = [lambda: target.copy_(source)]
    for op, call in ours.items():
        labels.append((op, "fastlora"))
        calls.append(call)
        if op in theirs:
            labels.append((op, "bitsandbytes"))
            calls.append(theirs[op])
    moved = {
        "copy": 2 * source.nbytes,
        "quantize": weight.nbytes + q.nbytes,
        "dequantize": weight.nbytes + q.nbytes,
    }
    rows = []
    copy_rate = 0.0
    for (op, contender), times in zip(labels, timed(calls, rounds), strict=True):
        times.sort()
        rate = moved[op] / median(times) / 1e3
        copy_rate = copy_rate or rate
        rows.append(
            {
                "op": op,
                "n": n,
                "k": k,
                "dtype": str(dtype).removeprefix("torch."),
                "contender": contender,
                "us_p50": round(median(times), 2),
                "us_p20": round(times[len(times) // 5], 2),
                "us_p80": round(times[len(times) * 4 // 5], 2),
                "gbps": round(rate, 1),
                "of_copy_rate": round(rate / copy_rate, 3),
            }
        )
    return rows


def about() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    try:
        from importlib.metadata import version

        peer = version("bitsandbytes")
    except ImportError:
        peer = "not installed"
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "fastlora": f"{fastlora.__version__} at {commit()}",
        "bitsandbytes": peer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, torch found none")
    if not fastlora._C.cuda_built:
        parser.error("expected a build with CUDA kernels, this one holds none")
    cases = [(n, k, dtype) for n, k in SHAPES for dtype in (torch.bfloat16, torch.float32)]
    rows = [row for case in tqdm(cases, unit="case") for row in measure(*case, options.rounds)]
    facts = about()
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.out / slug(facts["device"])
    with base.with_suffix(".csv.tmp").open("w", newline="") as file:
        for key, value in facts.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    base.with_suffix(".csv.tmp").replace(base.with_suffix(".csv"))
    lines = [f"# {facts['device']}", "", *(f"- {k}: {v}" for k, v in facts.items()), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(str(row[c]) for c in COLUMNS) + " |" for row in rows]
    base.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(base.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
