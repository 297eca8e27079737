"""Which instruction-set level the kernels run at: the best one here, ``FASTLORA_ISA``, or :func:`use_isa`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from . import _C

LEVELS = {_C.isa_name(i): i for i in range(_C.isa_count)}


def _level_code(name: str) -> int:
    if name not in LEVELS:
        raise ValueError(f"isa: expected one of {', '.join(LEVELS)}, got {name!r}")
    code = LEVELS[name]
    if not _C.isa_available(code):
        raise RuntimeError(
            f"isa: level {name!r} is not available on this machine (the best one here is "
            f"{_C.isa_name(_C.best_isa())!r})"
        )
    return code


_current: int = _level_code(os.environ["FASTLORA_ISA"]) if os.environ.get("FASTLORA_ISA") else _C.best_isa()


def level() -> int:
    """The level in force as the kernels take it."""
    return _current


def current_isa() -> str:
    """The instruction-set level in force: the best one, ``FASTLORA_ISA``, or what :func:`use_isa` set."""
    return _C.isa_name(_current)


def available_isas() -> list[str]:
    """The levels this machine can run, lowest first (``amx_emulated`` is for tests)."""
    return [name for name, code in LEVELS.items() if _C.isa_available(code)]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Force an instruction-set level for the calls inside, process-wide. ValueError for an unknown name,
    RuntimeError for a level this machine lacks."""
    global _current  # noqa: PLW0603
    previous, _current = _current, _level_code(name)
    try:
        yield
    finally:
        _current = previous
