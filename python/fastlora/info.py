"""What this installation can do, as plain data: what `python -m fastlora info` shows."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from . import _C, isa

# Package -> what it adds.
OPTIONAL = {
    "bitsandbytes": "reading and comparing its checkpoints",
    "peft": "loading saved adapters onto a dense model",
    "transformers": "models to convert",
    "matplotlib": "the plots of the demo and of the benchmarks",
}
# Level -> what the CPU needs, so that a missing one explains itself.
_NEEDS = {
    "avx2": "AVX2, FMA and F16C",
    "avx512": "AVX-512 F, BW, DQ, VL and VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx": "AMX-TILE and AMX-BF16, and the operating system's permission",
    "amx_emulated": "AVX-512 BF16 (a level for tests)",
}


def collect() -> dict[str, Any]:
    """The facts as JSON-ready values; "missing" maps what is not there to the reason."""
    levels = [_C.isa_name(i) for i in range(_C.isa_count)]
    available = isa.available_isas()
    missing: dict[str, str] = {}
    for level in levels:
        if level not in available:
            built = platform.machine().lower() in ("x86_64", "amd64")
            needs = f"needs {_NEEDS.get(level, 'another CPU')}"
            missing[f"level {level}"] = needs if built else f"not built for {platform.machine()}"
    devices = _cuda_devices()
    if not _C.cuda_built:
        missing["CUDA kernels"] = "not built: FASTLORA_CUDA was OFF, or there was no CUDA compiler"
    elif not devices:
        missing["CUDA device"] = _why_no_cuda()
    packages: dict[str, str | None] = {}
    for package, use in OPTIONAL.items():
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            packages[package] = None
            missing[package] = f"not installed; for {use}"
    return {
        "fastlora": _C.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "level": isa.current_isa(),
        "level_forced_by": "FASTLORA_ISA" if os.environ.get("FASTLORA_ISA") else None,
        "levels_available": available,
        "threads": torch.get_num_threads(),
        "cuda_built": _C.cuda_built,
        "torch_cuda": torch.version.cuda,
        "cuda_devices": devices,
        "packages": packages,
        "missing": missing,
    }


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices.append(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)")
    return devices


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return "torch found no usable NVIDIA device or driver"
