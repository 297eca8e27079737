"""Processes that form a world of torch.distributed, kept for all tests of a file.

A test hands a World a function of its own file; every rank calls it with its number first. The processes are
forked from a server that has imported torch once. A world in which a rank failed is ended, and the next test
gets a new one, as the other ranks may wait for that one for ever.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

PATIENCE = 60  # seconds that a collective waits for a rank
_FORKS = multiprocessing.get_context("forkserver")
_IMPORTED = [
    "torch._dynamo",  # which the first step of an optimiser imports
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "fastlora.integrations.tensor_parallel",
]


def also_imports(*modules: str) -> None:
    """What the tests of a file need; no effect once a world has been started."""
    _IMPORTED.extend(modules)
    _FORKS.set_forkserver_preload(_IMPORTED)


also_imports()


class World:
    """`size` processes on this machine that talk through gloo."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., None], *args: object) -> None:
        """function(rank, *args) in every process at once; raises the first failure, with its traceback."""
        if not self._ranks:
            self._start()
        waiting = [pipe for _, pipe in self._ranks]
        for pipe in waiting:
            pipe.send((function, args))
        while waiting:
            for pipe in wait(waiting):
                try:
                    failure = pipe.recv()
                except EOFError:
                    failure = "a rank ended without a word"
                waiting.remove(pipe)
                if failure is not None:
                    self.close()
                    pytest.fail(failure, pytrace=False)

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        rendezvous = Path(self._folder.name) / "rendezvous"
        for rank in range(self.size):
            ours, theirs = _FORKS.Pipe()
            process = _FORKS.Process(target=_serve, args=(rank, self.size, rendezvous, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def close(self) -> None:
        for process, pipe in self._ranks:
            pipe.close()
            process.terminate()
            process.join()
        if self._ranks:
            self._folder.cleanup()
        self._ranks = []


def _serve(rank: int, size: int, rendezvous: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE),
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            function(rank, *args)
            distributed.barrier()
            pipe.send(None)
        except BaseException:
            pipe.send(f"rank {rank} of {size}: {traceback.format_exc()}")


def worlds(*sizes: int) -> Any:
    """A fixture, to be named in a test file, of worlds of these sizes."""

    @pytest.fixture(scope="module", params=sizes, ids=[f"{size} ranks" for size in sizes])
    def world(request: pytest.FixtureRequest) -> Iterator[World]:
        if not distributed.is_gloo_available():
            pytest.skip("this torch was built without gloo")
        made = World(request.param)
        yield made
        made.close()

    return world
