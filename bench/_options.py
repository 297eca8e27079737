"""The command line of run.py. Nothing here imports torch: what --isa needs goes before."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

SUITES = (
    "quantize",
    "linear",
    "backward",
    "train",
    "segmented",
    "trainers",
    "optimizer",
    "memory",
    "overhead",
)
DTYPES = ("float32", "bfloat16", "float16")
ROUTES = ("decode", "tile", "warpgroup", "dense")  # of fastlora's CUDA kernels
LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")


def _listed(convert: Callable[[str], object]) -> Callable[[str], list]:
    return lambda text: [convert(part.strip()) for part in text.split(",")]


def shape(text: str) -> tuple[int, int]:
    n, times, k = text.partition("x")
    if not times or int(n) < 1 or int(k) < 1:
        raise ValueError
    return int(n), int(k)


def count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


shape.__name__, count.__name__ = (
    "shape (n x k, as 4096x4096)",
    "count",
)  # what argparse calls them in errors


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add(
        "--suite",
        type=_listed(str),
        action="extend",
        metavar="NAME,...",
        help=f"{', '.join(SUITES)} or all (default); may be repeated",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--shapes", type=_listed(shape), metavar="NxK,...", help="out x in; default: real layers")
    add("--rows", type=_listed(count), metavar="M,...", help="default: each suite's own")
    add("--ranks", type=_listed(int), metavar="R,...", default=[16], help="default 16; 0 is no adapter")
    add(
        "--dtype",
        type=_listed(str),
        metavar="NAME,...",
        help=f"of {', '.join(DTYPES)}; default: each suite's own",
    )
    add("--isa", choices=LEVELS, help="force fastlora's level; avx2 caps the dense libraries too")
    add("--threads", type=count, metavar="N", help="default: torch's")
    add("--peers", type=_listed(str), metavar="NAME,...", help="names or their beginnings; default: all")
    add("--rounds", type=count, metavar="N", help="most timed calls at a size, default 25 (a GPU: 100)")
    add(
        "--seconds",
        type=float,
        metavar="S",
        help="about so long for one at a size, default 0.12 (a GPU: 0.2)",
    )
    add(
        "--routes",
        type=_listed(str),
        metavar="NAME,...",
        help=f"with --device cuda: fastlora by each of {', '.join(ROUTES)} (or all), beside its own choice",
    )
    add("--limit", type=float, metavar="S", help="begin no case after so many seconds")
    caches = made.add_mutually_exclusive_group()
    caches.add_argument("--cold", action="store_true", help="empty the caches before every call (default)")
    caches.add_argument("--warm", action="store_true", help="call once before every timed call instead")
    add("--quick", action="store_true", help="one small shape, three row counts, a few calls each")
    add("--json", type=Path, metavar="FILE")
    add("--csv", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="DIR", help="PNG plots")
    add("--save", type=Path, metavar="DIR", help="<machine>.csv, <machine>.md and the plots, all in DIR")
    add("--machine", metavar="NAME", help="name of the files in DIR, default from what was measured")
    return made


def parse(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Checked options; exits with a message otherwise. options.suite is a tuple of suites."""
    made = parser(description)
    options = made.parse_args(arguments)
    given = options.suite or ["all"]
    routes = options.routes or []
    for values, known in (
        (given, (*SUITES, "all")),
        (options.dtype or [], DTYPES),
        (routes, (*ROUTES, "all")),
    ):
        if not set(values) <= set(known):
            made.error(f"expected some of {', '.join(known)}, got {','.join(values)}")
    if min(options.ranks) < 0:
        made.error(f"expected ranks of at least 0, got {options.ranks}")
    if options.device == "cpu" and routes:
        made.error("expected --device cuda with --routes")
    if options.device == "cuda" and options.isa:
        made.error("expected --device cpu with --isa")
    options.routes = ROUTES if "all" in routes else tuple(name for name in ROUTES if name in routes)
    if options.routes and not options.suite:
        given = ["linear", "backward"]
    options.suite = SUITES if "all" in given else tuple(name for name in SUITES if name in given)
    return options


def set_environment(options: argparse.Namespace) -> None:
    """What must stand before torch is imported: an AVX2 machine's dense libraries, for a fair comparison."""
    if options.isa == "avx2":
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
