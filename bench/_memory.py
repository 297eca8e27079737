"""How much memory a call takes beside what was there."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth(call: Callable[[], object]) -> int | None:
    """How many bytes of memory `call` takes beside what was there, its result included; None where the system
    cannot tell. It runs once before, so that what it keeps (kernels' scratch, libraries' caches) is there."""
    call()
    gc.collect()
    try:
        # Freed memory back to the system, as it would hide the next call's need; the peak starts again.
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


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
