"""The machine's own speeds, measured in the same process and by as many threads as everything else.

The loops are in csrc/bench/, compiled into the module ``fastlora._roofs`` by ``make venv``. Where that module
was not built, results carry no per cent of a roof, and say so.
"""

from __future__ import annotations

from dataclasses import dataclass

from _machine import last_level_cache_bytes

from fastlora import isa

READ_ROWS = 8  # up to here a layer is bound by reading its weight, beyond by arithmetic


@dataclass(frozen=True)
class Roofs:
    """GB/s (a copy counts bytes read and written) and TFLOP/s; bf16 is None without such instructions."""

    read_gbps: float
    read_cached_gbps: float
    copy_gbps: float
    fma_tflops: float
    bf16_tflops: float | None
    bf16_with: str

    def of_layer(self, m: int, moved: int, flops: float, dtype: str, cold: bool) -> tuple[str, float]:
        """(name, seconds): reading for a few rows, arithmetic for many."""
        return self.of_read(moved, cold) if m <= READ_ROWS else self.of_product(flops, dtype)

    def of_quantize(self, read: int, written: int, cold: bool) -> tuple[str, float]:
        """One read of the weight: what is written is a quarter of it or less."""
        return self.of_read(read, cold)

    def of_read(self, moved: int, cold: bool) -> tuple[str, float]:
        """(name, seconds) of reading `moved` bytes, from where they are before a call."""
        if cold or moved > last_level_cache_bytes() / 2:
            return "read", moved / self.read_gbps / 1e9
        return "read, cached", moved / self.read_cached_gbps / 1e9

    def of_copy(self, moved: int) -> tuple[str, float]:
        return "copy", moved / self.copy_gbps / 1e9

    def of_product(self, flops: float, dtype: str) -> tuple[str, float]:
        if dtype == "bfloat16" and self.bf16_tflops is not None:
            return self.bf16_with, flops / self.bf16_tflops / 1e12
        return "FMA", flops / self.fma_tflops / 1e12

    def describe(self) -> dict[str, str]:
        """One line each of the results' header."""
        lines = {
            "read roof": f"{self.read_gbps:.1f} GB/s past the caches, {self.read_cached_gbps:.1f} in them",
            "copy roof": f"{self.copy_gbps:.1f} GB/s, read and written",
            "FMA roof": f"{self.fma_tflops:.3f} TFLOP/s in float32",
        }
        if self.bf16_tflops is not None:
            lines["bfloat16 roof"] = f"{self.bf16_tflops:.3f} TFLOP/s, {self.bf16_with}, one operand from L2"
        return lines


def measure(threads: int, *, quick: bool = False) -> tuple[Roofs | None, str]:
    """The roofs at the level in force, or None and why not. About a second and a half."""
    try:
        from fastlora import _roofs
    except ImportError:
        return None, "fastlora._roofs was not built (make venv builds it; FASTLORA_BENCH=ON)"
    name, level = isa.current_isa(), isa.level()
    if name == "amx_emulated":
        name, level = "avx512_bf16", isa.LEVELS["avx512_bf16"]
    # The best of many short repeats, so that other work on the machine is unlikely to meet them all.
    far_repeats, repeats = (3, 10) if quick else (12, 100)
    cache = last_level_cache_bytes()
    far = (64 if quick else max(256, 4 * cache >> 20)) << 20
    near = cache // 4
    bf16 = None
    if name in ("avx512_bf16", "amx"):
        bf16 = _roofs.bf16_tflops(level, threads, repeats)
    return (
        Roofs(
            read_gbps=_roofs.read_gbps(level, far, threads, far_repeats),
            read_cached_gbps=_roofs.read_gbps(level, near, threads, repeats),
            copy_gbps=max(
                _roofs.copy_gbps(level, far // 2, threads, far_repeats, streaming)
                for streaming in (False, True)
            ),
            fma_tflops=_roofs.fma_tflops(level, threads, repeats),
            bf16_tflops=bf16,
            bf16_with="AMX" if name == "amx" else "vdpbf16ps" if bf16 else "",
        ),
        "",
    )
