"""Tensors on a CUDA device that may leave it for pinned memory of the host, by copies in the background.

A :class:`PinnedStore` keeps its tensors on the device while there is room. Those that it moved to the host
come back before each use, into one of a few staging buffers, and go home after it: while one parameter is
updated, the next one's states come in on one stream and the last one's go out on another. Events order the
copies; the host waits for none of them, but where memory has become short.

Everything that is asked of the device goes through :class:`Cuda`, so that tests can put a device in its place
that checks the order of copies and updates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

# One is in use, one is filled with what is used next, one is written back.
_STAGES = 3
# Of the device's memory, what is left free for others.
_HEADROOM = 1 / 32
# Where tensors begin in a staging buffer: at whole vectors, as kernels want them.
_ALIGNMENT = 256


class Cuda:
    """A CUDA device as a store uses it: memory, streams, events, copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.incoming: Any = torch.cuda.Stream(device)
        self.outgoing: Any = torch.cuda.Stream(device)

    def current(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def zero(self, t: Tensor) -> None:
        """On the current stream."""
        t.zero_()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)

    def copy(self, to: Tensor, source: Tensor, stream: Any) -> None:
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
        # Memory that is freed while the copy is under way is not given to others before its end.
        (to if to.is_cuda else source).record_stream(stream)

    def record(self, stream: Any) -> Any:
        return stream.record_event()

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def wait_host(self, event: Any) -> None:
        event.synchronize()

    def memory(self) -> tuple[int, int]:
        """Free bytes and all bytes of the device, as the driver sees them."""
        return torch.cuda.mem_get_info(self.device)

    def give_back(self) -> None:
        """What torch keeps of freed memory, to the driver; waits for the copies out of it."""
        torch.cuda.empty_cache()


@dataclass
class _Home:
    """A tensor's place on the host, and when the last copy to it has ended."""

    tensor: Tensor
    written: Any = None


@dataclass(eq=False)
class _Stage:
    """A staging buffer: who is in it, when they are there, and when it may be filled again."""

    room: Tensor | None = None
    tensors: list[Tensor] = field(default_factory=list)
    filled: Any = None
    free: Any = None


class PinnedStore:
    """Makes tensors that may leave the device.

    ``resident_bytes`` bounds what of them stays on the device between uses: those made when it is full begin
    on the host. None: what is free on the device decides. A tensor that would leave less than 1/32 of the
    device's memory to others begins on the host. Where others have left less than that after a step
    (:meth:`relieve`), or too little for a staging buffer, the tensors that were used longest ago move to the
    host. What is there stays there between uses: a step takes all tensors in turn, so that to bring one back
    for good would only put out the one that is used next.

    A tensor stays the same object wherever it is; between :meth:`ready` and :meth:`done_with` it is on the
    device. One that is on the host may be read after :meth:`settle`.

    Raises ValueError for a bound that is no positive number.
    """

    def __init__(self, device: Cuda, resident_bytes: int | None = None) -> None:
        if resident_bytes is not None and resident_bytes <= 0:
            raise ValueError(f"PinnedStore: expected resident_bytes of 1 or more, got {resident_bytes}")
        self.resident_bytes = resident_bytes
        self._device = device
        # By id; the tensors are held, so that no id can become another's.
        self._owned: dict[int, Tensor] = {}
        self._resident: dict[int, int] = {}  # id -> bytes, the one used last at the end
        self._homes: dict[int, _Home] = {}  # of those that have moved
        self._stages = [_Stage() for _ in range(_STAGES)]
        self._staged: dict[int, _Stage] = {}

    def zeros(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros, contiguous, on the device if there is room for it and else on the host."""
        shape = tuple(shape)
        size = prod(shape) * dtype.itemsize
        t = self._on_device(shape, dtype) if self._has_room(size) else None
        if t is not None:
            self._resident[id(t)] = size
        else:
            t = self._device.pinned(shape, dtype).zero_()
            self._homes[id(t)] = _Home(t.detach())
        self._owned[id(t)] = t
        return t

    def owns(self, t: Tensor) -> bool:
        return self._owned.get(id(t)) is t

    def will_need(self, *tensors: Tensor) -> None:
        """Begin to bring those to the device that are on the host. No effect on tensors of others."""
        if self._away(tensors):
            # Together, should some be there already: who is used at once has one stage.
            for stage in self._stages_of(tensors):
                self._send_home(stage)
            self._bring(tensors)

    def ready(self, *tensors: Tensor) -> None:
        """From here on the current stream may use them."""
        self.will_need(*tensors)
        for stage in self._stages_of(tensors):
            self._device.wait(self._device.current(), stage.filled)

    def done_with(self, *tensors: Tensor) -> None:
        """The current stream has used them and will not for a while. No effect on tensors of others."""
        for stage in self._stages_of(tensors):
            self._send_home(stage)
        for key in (id(t) for t in tensors if self.owns(t)):
            if key in self._resident:
                self._resident[key] = self._resident.pop(key)

    def relieve(self) -> None:
        """After a step: move to the host what leaves too little free for others."""
        if self.resident_bytes is not None or not self._resident:
            return
        free, total = self._device.memory()
        short = int(total * _HEADROOM) - free
        if short <= 0:
            return
        while short > 0 and self._resident:
            short -= self._evict()
        self._device.give_back()

    def settle(self) -> None:
        """Returns when every tensor on the host has its last values."""
        for stage in self._stages:
            if stage.tensors:
                self._send_home(stage)
        for home in self._homes.values():
            if home.written is not None:
                self._device.wait_host(home.written)
                home.written = None

    # --- room ---------------------------------------------------------------------------------------------

    def _has_room(self, size: int) -> bool:
        if self.resident_bytes is not None:
            return sum(self._resident.values()) + size <= self.resident_bytes
        free, total = self._device.memory()
        return free - size >= total * _HEADROOM

    def _on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        try:
            t = self._device.empty(shape, dtype)
        except torch.OutOfMemoryError:
            return None
        self._device.zero(t)
        return t

    def _evict(self) -> int:
        """Move the tensor that was used longest ago to the host; its bytes."""
        key = next(iter(self._resident))
        t, device = self._owned[key], self._device
        home = _Home(device.pinned(tuple(t.shape), t.dtype))
        device.wait(device.outgoing, device.record(device.current()))
        device.copy(home.tensor, t.detach(), device.outgoing)
        home.written = device.record(device.outgoing)
        t.data = home.tensor
        self._homes[key] = home
        return self._resident.pop(key)

    # --- staging ------------------------------------------------------------------------------------------

    def _away(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return [t for t in tensors if self.owns(t) and id(t) in self._homes and id(t) not in self._staged]

    def _stages_of(self, tensors: Iterable[Tensor]) -> list[_Stage]:
        return list(dict.fromkeys(self._staged[id(t)] for t in tensors if id(t) in self._staged))

    def _bring(self, wanted: Iterable[Tensor]) -> None:
        device, tensors = self._device, self._away(wanted)
        stage = next((it for it in self._stages if not it.tensors), self._stages[0])
        self._stages.remove(stage)
        self._stages.append(stage)  # the one filled last
        if stage.tensors:  # all are in use: after a step that failed
            self._send_home(stage)
        while True:
            sizes = [-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in tensors]
            room = self._room_of(stage, sum(sizes))
            if len(self._away(wanted)) == len(tensors):
                break
            tensors = self._away(wanted)  # more of them, which had to leave for this room
        if stage.free is not None:
            device.wait(device.incoming, stage.free)
        begin = 0
        for t, size in zip(tensors, sizes, strict=True):
            home = self._homes[id(t)]
            place = room[begin : begin + t.nbytes].view(t.dtype).view(t.shape)
            if home.written is not None:
                device.wait(device.incoming, home.written)
            device.copy(place, home.tensor, device.incoming)
            t.data = place
            self._staged[id(t)] = stage
            begin += size
        stage.tensors = tensors
        stage.filled = device.record(device.incoming)

    def _room_of(self, stage: _Stage, size: int) -> Tensor:
        if stage.room is not None and stage.room.nbytes >= size:
            return stage.room
        stage.room = None  # before the larger one is asked for
        while True:
            try:
                room = self._device.empty((size,), torch.uint8)
                break
            except torch.OutOfMemoryError:
                if not self._resident:
                    raise
                self._evict()
        # What the current stream did with this memory before comes first.
        stage.room, stage.free = room, self._device.record(self._device.current())
        return room

    def _send_home(self, stage: _Stage) -> None:
        device = self._device
        device.wait(device.outgoing, device.record(device.current()))
        # A copy in that nothing has used yet.
        device.wait(device.outgoing, stage.filled)
        for t in stage.tensors:
            home = self._homes[id(t)]
            device.copy(home.tensor, t.detach(), device.outgoing)
            t.data = home.tensor
            del self._staged[id(t)]
        stage.free = device.record(device.outgoing)
        for t in stage.tensors:
            self._homes[id(t)].written = stage.free
        stage.tensors = []
