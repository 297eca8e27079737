"""How much memory a call takes beside what was there."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth(call: Callable[[], object], before: int | None = None) -> int | None:
    """How many bytes of memory `call` takes beside what was there (or beside `before`), its result included;
    None where the system cannot tell. It runs once before, so that what it keeps (kernels' scratch, caches of
    libraries) is there."""
    call()
    there = settled_bytes()
    try:
        _CLEAR.write_text("5")  # the peak starts again
    except OSError:
        return None
    if there is None:
        return None
    call()
    return max(_status("VmHWM") - (there if before is None else before), 0)


def settled_bytes() -> int | None:
    """What this process holds once it gave back what it has freed, which would hide the next call's need."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def peak_growth_cuda(call: Callable[[], object]) -> int:
    """The same of torch's allocator on the current CUDA device."""
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
