"""Measure fastlora's layer and its peers on this machine; results go to bench/results/<machine>.{csv,md,png}.

    make bench
    python bench/run.py --shapes 4096x4096,14336x4096 --rows 1,16,128 --dtypes bfloat16,float32 --warm

Every contender gets the same weight, adapter and input. Each result is checked against float64 first, and the
contenders are then timed in turns.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
from _machine import default_name, describe
from _results import Row, plot, write_csv, write_markdown
from _timing import interleaved
from peers import SCALING, Peer
from peers.dense import Dense
from peers.fastlora_nf4 import Fastlora
from torch import Tensor
from tqdm import tqdm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = ("forward", "training step")


def contenders(op: str) -> list[type[Peer]]:
    """The layers that can do `op`. bitsandbytes' eval mode cannot train."""
    found: list[type[Peer]] = [Dense]
    try:
        from peers.bitsandbytes_nf4 import BitsandbytesEval, BitsandbytesTraining
    except ImportError:
        tqdm.write("bitsandbytes is not installed: not measured")
    else:
        found += [BitsandbytesTraining] if op == "training step" else [BitsandbytesTraining, BitsandbytesEval]
    return [*found, Fastlora]


def exact(op: str, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """The op's result in float64: y of a forward, x's gradient for dy = 1 of a training step."""
    whole = weight.double() + SCALING * lora_b.double() @ lora_a.double()
    if op == "forward":
        return x.double() @ whole.T
    return torch.ones(x.shape[0], whole.shape[0], dtype=torch.float64) @ whole


def relative_error(found: Tensor, want: Tensor) -> float:
    return ((found.double() - want).norm() / want.norm()).item()


def caller(op: str, peer: Peer, x: Tensor) -> Callable[[], Tensor | None]:
    if op == "forward":
        return lambda: peer.forward(x)
    leaf = x.clone().requires_grad_()
    return lambda: peer.step(leaf)


def measure(op: str, n: int, k: int, r: int, dtype: str, options: argparse.Namespace) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    kind = DTYPES[dtype]

    def normal(*shape: int) -> Tensor:  # rounded to dtype: every layer starts from the same numbers
        return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).to(kind).float()

    weight, lora_a, lora_b = normal(n, k), normal(r, k), normal(n, r).mul_(0.1).to(kind).float()
    peers = [make(weight, lora_a, lora_b, kind) for make in contenders(op)]
    stored = [peer.represented() for peer in peers]
    rows: list[Row] = []
    for m in tqdm(options.rows, desc=f"{op} {n}x{k} r {r} {dtype}", unit="m"):
        x = torch.randn(m, k, generator=generator).to(kind)
        calls = [caller(op, peer, x) for peer in peers]
        errors = []
        for call, held in zip(calls, stored, strict=True):
            found = call()
            assert found is not None
            errors.append(
                (
                    relative_error(found, exact(op, x, held, lora_a, lora_b)),
                    relative_error(found, exact(op, x, weight, lora_a, lora_b)),
                )
            )
        times = interleaved(calls, rounds=options.rounds, cold=not options.warm)
        passes = 1 if op == "forward" else 2
        flops = passes * 2 * m * n * k + (1 if op == "forward" else 3) * 2 * m * r * (n + k)
        for peer, t, (arithmetic, total) in zip(peers, times, errors, strict=True):
            moved = passes * (peer.weight_bytes() + m * (n + k) * kind.itemsize)
            rows.append(
                Row(
                    op=op,
                    n=n,
                    k=k,
                    r=r,
                    m=m,
                    dtype=dtype,
                    cache="warm" if options.warm else "cold",
                    peer=peer.name,
                    p20_us=1e6 * t.p20,
                    p50_us=1e6 * t.p50,
                    p80_us=1e6 * t.p80,
                    gbps=moved / t.p50 / 1e9,
                    tflops=flops / t.p50 / 1e12,
                    arithmetic_error=arithmetic,
                    total_error=total,
                    weight_mib=peer.weight_bytes() / 2**20,
                )
            )
    return rows


def parse_arguments() -> argparse.Namespace:
    def listed(convert: Callable[[str], object]) -> Callable[[str], list]:
        return lambda text: [convert(part) for part in text.split(",")]

    def shape(text: str) -> tuple[int, int]:
        n, k = text.split("x")
        return int(n), int(k)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", type=listed(shape), default=[(4096, 4096)], help="out x in, default 4096x4096")
    add("--rows", type=listed(int), default=[1, 4, 16, 64, 256, 1024], help="default 1,4,16,64,256,1024")
    add("--ranks", type=listed(int), default=[16], help="default 16; 0 is a layer without an adapter")
    add("--dtypes", type=listed(str), default=["bfloat16"], help="default bfloat16")
    add("--ops", type=listed(str), default=list(OPS), help=f"default {','.join(OPS)}")
    add("--rounds", type=int, default=15, help="timed calls of each contender at each size, default 15")
    add(
        "--warm", action="store_true", help="leave the weights in cache (default: flush it before every call)"
    )
    add("--machine", default=default_name(), help="name of the result files")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    for given, known in ((options.dtypes, DTYPES), (options.ops, OPS)):
        if not set(given) <= set(known):
            parser.error(f"expected some of {', '.join(known)}, got {','.join(given)}")
    return options


def main() -> None:
    options = parse_arguments()
    about = describe() | {"load when it began": f"{os.getloadavg()[0]:.2f}"}
    rows: list[Row] = []
    for op in options.ops:
        for dtype in options.dtypes:
            for n, k in options.shapes:
                for r in options.ranks:
                    rows += measure(op, n, k, r, dtype, options)
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.out / options.machine
    write_csv(base.with_suffix(".csv"), about, rows)
    write_markdown(base.with_suffix(".md"), about, rows)
    plot(base.with_suffix(".png"), about, rows)
    print(base.with_suffix(".md").read_text())
    print(
        f"wrote {base}.csv, .md, .png; python bench/readme_table.py {options.machine} puts them into README"
    )


if __name__ == "__main__":
    main()
