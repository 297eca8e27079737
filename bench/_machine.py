"""What a result was measured on."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastlora


def processor() -> str:
    """The processor's own name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(
            re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        )
        if "model name" in fields:
            return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return platform.processor() or platform.machine()


def last_level_cache_bytes() -> int:
    """Of the largest cache that Linux shows for the first processor (32 MiB where it shows none)."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number = re.fullmatch(r"(\d+)([KMG])", file.read_text().strip())
        if number:
            sizes.append(int(number[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[number[2]])
    return max(sizes, default=32 * 2**20)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def ask(*command: str) -> str:
    """The first line of what a program says, here; "unknown" where it says nothing or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return done.stdout.strip().partition("\n")[0] or "unknown"


def commit() -> str:
    """The commit that was measured, with -dirty if the tree differs from it ("unknown" outside git)."""
    return ask("git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def software() -> dict[str, str]:
    """What of it matters, one line each of the results' header."""
    return {
        "fastlora": f"{fastlora.__version__} at {commit()}",
        "torch": torch.__version__,
        **{name: _version(name) for name in ("bitsandbytes", "peft", "torchao")},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
