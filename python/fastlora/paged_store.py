"""Tensors on a CPU that the system may put out of memory: files mapped into it.

A page of ordinary memory can leave it only where there is swap space; a page of a mapped file goes back to
its file. :class:`PagedStore` makes such tensors and tells the system what is read next and what is not needed
for a while. Files are unlinked as soon as they are mapped: their space is given back with the tensor, and
when the process ends, in whatever way.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from math import prod
from pathlib import Path
from typing import cast

import torch
from torch import Tensor


class PagedStore:
    """Makes tensors that lie in mapped files.

    ``directory`` (the system's folder for temporary files) must lie on a disk for pages to leave memory: a
    tmpfs is memory, and its pages leave only for swap space. ``resident_bytes`` bounds what this process has
    mapped of its tensors between uses: those used longest ago are unmapped first, and the system may drop
    them without looking for them. None leaves the choice to the system: telling it after each use that these
    pages may go first (MADV_COLD) made a step two thirds longer, on a loaded machine. On systems
    without ``madvise`` there are no hints and no bound.

    Raises ValueError for a directory that is not there, or a bound that is no positive number.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, resident_bytes: int | None = None):
        self.directory = Path(tempfile.gettempdir() if directory is None else directory)
        if not self.directory.is_dir():
            raise ValueError(f"PagedStore: expected a directory that exists, got {str(self.directory)!r}")
        if resident_bytes is not None and resident_bytes <= 0:
            raise ValueError(f"PagedStore: expected resident_bytes of 1 or more, got {resident_bytes}")
        self.resident_bytes = resident_bytes
        # By address. The tensors are held, so that no hint can reach memory that is another's by now.
        self._owned: dict[int, Tensor] = {}
        self._mapped: dict[int, int] = {}  # address -> bytes, the one used last at the end
        self._total = 0

    def zeros(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros, contiguous, with a file of its own. Raises OSError where the disk is full."""
        shape = tuple(shape)
        size = prod(shape) * dtype.itemsize
        if not size:
            return torch.zeros(shape, dtype=dtype)
        descriptor, name = tempfile.mkstemp(prefix="fastlora-", dir=self.directory)
        try:
            # Space now: a disk that is full when a page is written would end the process.
            _reserve(descriptor, size)
            storage = torch.UntypedStorage.from_file(name, shared=True, nbytes=size)
        finally:
            os.close(descriptor)
            os.unlink(name)
        t = torch.empty(0, dtype=dtype).set_(cast(torch.UntypedStorage, storage)).view(shape)
        self._owned[t.data_ptr()] = t
        return t

    def owns(self, t: Tensor) -> bool:
        return t.data_ptr() in self._owned

    def will_need(self, *tensors: Tensor) -> None:
        """Begin to read what is not in memory; returns at once. No effect on tensors of others."""
        for t in filter(self.owns, tensors):
            _advise(t, mmap.MADV_WILLNEED)

    def ready(self, *tensors: Tensor) -> None:
        """They are used now: the system reads what is missing as it is touched."""

    def done_with(self, *tensors: Tensor) -> None:
        """They have been used and will not be for a while. No effect on tensors of others."""
        for t in filter(self.owns, tensors):
            address = t.data_ptr()
            self._total += t.nbytes - self._mapped.pop(address, 0)
            self._mapped[address] = t.nbytes
        while self.resident_bytes is not None and self._total > self.resident_bytes:
            oldest = next(iter(self._mapped))
            self._total -= self._mapped.pop(oldest)
            # Of a shared mapping nothing is lost: its pages, written or not, are the file's.
            _advise(self._owned[oldest], mmap.MADV_DONTNEED)

    def relieve(self) -> None:
        """After a step: nothing, as the system takes what it is short of."""

    def settle(self) -> None:
        """They may always be read."""


def _reserve(descriptor: int, size: int) -> None:
    reserve: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    if reserve is not None:
        try:
            return reserve(descriptor, 0, size)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:  # a file system that cannot
                raise
    os.ftruncate(descriptor, size)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def _advise(t: Tensor, advice: int) -> None:
    """A hint: one that the system does not know is not heard."""
    function = _madvise()
    if function is not None:
        function(t.data_ptr(), t.nbytes, advice)
