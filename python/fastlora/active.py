"""Which batch a layer's call belongs to: the routings in force, by thread, and those of passes that are
replayed.

A thread's ``with fastlora.adapters(...)`` holds for that thread's calls. Activation checkpointing calls
layers once more during backward, when the block may have been left; such a call takes the routing under which
the node of autograd that asks for it was made. Nodes carry the number at which their thread made them, so a
block is remembered by the span of numbers that it saw.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

from .routing import Router

_task = torch._C._current_graph_task_id  # of the backward pass that this thread is in; -1: none
_node = torch._C._current_autograd_node
_next_number = torch._C._autograd._get_sequence_nr  # of the next node that this thread makes
_MOST = 256  # blocks with nodes that are remembered for their backward pass


class Place:
    """A layer, as a batch knows it: which router is in force there."""

    def __init__(self) -> None:
        self.routers: dict[int, Router] = {}  # by thread
        self.routed = False  # ever
        # What torch.compile reads, which cannot ask for the thread: the router, where one thread has one.
        self.compiled: Router | None = None
        self.contended = False

    def set(self, router: Router | None) -> Router | None:
        """Put a router in force for this thread; returns the one before."""
        thread = threading.get_ident()
        with _LOCK:
            before = self.routers.pop(thread, None)
            if router is not None:
                self.routers[thread] = router
                self.routed = True
            self.contended = len(self.routers) > 1
            self.compiled = next(iter(self.routers.values())) if len(self.routers) == 1 else None
        return before

    def current(self) -> Router | None:
        """What this call is to be routed by."""
        if torch.compiler.is_compiling():
            if self.contended:
                raise RuntimeError(
                    "QLinear: expected one thread at a time to route a compiled layer, got more"
                )
            return self.compiled
        if _task() >= 0 and self.routed:
            return _in_backward(self)
        return self.routers.get(threading.get_ident()) if self.routers else None

    def __deepcopy__(self, memo: dict[int, object]) -> Place:
        return Place()

    def __reduce__(self) -> tuple[type[Place], tuple[()]]:
        return Place, ()


class Batch:
    """A block that was entered: its routers, and the numbers [first, last) of the nodes made inside."""

    def __init__(self, routers: Mapping[Place, Router]) -> None:
        self.routers = routers
        self.task = _task()
        self.first = _next_number()
        self.last = 2**63
        self._before: list[tuple[Place, Router | None]] = []

    def enter(self) -> None:
        _LOCAL.history.enter(self)
        for place, router in self.routers.items():
            self._before.append((place, place.set(router)))

    def leave(self) -> None:
        for place, router in reversed(self._before):
            place.set(router)
        self.last = _next_number()
        _LOCAL.history.leave(self)

    def covers(self, number: int, place: Place) -> bool:
        return self.first <= number < self.last and place in self.routers


class _History:
    """A thread's blocks, in the order of their beginnings."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.forgotten = (
            0  # nodes of smaller numbers may have been made in a block that is not known any more
        )

    def enter(self, batch: Batch) -> None:
        if not self.batches:
            _HISTORIES.append(self)
        self.batches.append(batch)

    def leave(self, batch: Batch) -> None:
        if batch.last == batch.first:  # nothing that backward could come back to
            self.batches.remove(batch)
            if not self.batches:
                _HISTORIES.remove(self)
            return
        for router in set(batch.routers.values()):
            router.forget()
        closed = [one for one in self.batches if one.last < 2**63]
        if len(closed) > _MOST:
            self.batches.remove(closed[0])
            self.forgotten = max(self.forgotten, closed[0].last)

    def find(self, number: int, place: Place) -> Batch | None:
        """The innermost block that the node was made in, of those that know the place."""
        found = next((one for one in reversed(self.batches) if one.covers(number, place)), None)
        if found is None and number < self.forgotten:
            raise RuntimeError(
                f"QLinear: expected to replay one of the last {_MOST} blocks of adapters, got an older one; "
                "call backward more often, or inside the block"
            )
        return found


class _Local(threading.local):
    """Of each thread."""

    def __init__(self) -> None:
        self.history = _History()
        self.replays: list[Batch] = []  # what is replayed now, whose nodes may be asked to replay again


_LOCAL = _Local()
_HISTORIES: list[_History] = []  # of all threads, those with blocks
_LOCK = threading.Lock()


def _in_backward(place: Place) -> Router | None:
    task, node, own = _task(), _node(), _LOCAL.history.batches
    inside = place.routers.get(threading.get_ident())
    if node is None or (inside and any(one.task == task for one in own if place in one.routers)):
        return inside  # a block that was entered within this backward pass, by a hook
    number = node._sequence_nr()
    # A device's backward runs in a thread of its own, which has no blocks.
    histories = [_LOCAL.history] if own else list(_HISTORIES)
    found = [batch for history in histories if (batch := history.find(number, place)) is not None]
    replays = _LOCAL.replays
    if not found:
        found = [one for one in reversed(replays) if one.covers(number, place)][:1]
    if not found:
        return None
    if len({id(batch.routers[place]) for batch in found}) > 1:
        raise RuntimeError(
            "QLinear: expected one thread at a time to train a routed layer on a device, got more"
        )
    _replay(found[0], replays, task)
    return found[0].routers[place]


def _replay(batch: Batch, replays: list[Batch], task: int) -> None:
    """Remember that nodes made from here on, and the one just made (a checkpoint inside a checkpoint), belong
    to this batch again, until the backward pass ends."""
    if replays and replays[-1].task == task and replays[-1].routers is batch.routers:
        return
    again = Batch(batch.routers)
    again.first -= 1
    replays.append(again)
    torch.autograd.Variable._execution_engine.queue_callback(lambda: replays.remove(again))
