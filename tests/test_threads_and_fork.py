"""The ops from several Python threads at once, in forked children and in DataLoader workers."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from linear_cases import Case, Inputs, make_inputs
from torch.utils.data import DataLoader, Dataset

from fastlora import isa as levels

op = torch.ops.fastlora


def run(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return (*op.nf4_linear_with_u(*inputs.linear), *op.nf4_linear_grad_input(*inputs.grad_input))


def bits(tensors: tuple[torch.Tensor, ...]) -> list[bytes]:
    return [t.view(torch.uint8).numpy().tobytes() for t in tensors]


def same(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture
def two_threads(keep_threads: None) -> None:
    """At least two threads, so that there is a pool to lose, even on a machine of one core."""
    torch.set_num_threads(max(2, torch.get_num_threads()))


@pytest.mark.parametrize("m", [1, 5, 60])
def test_two_threads_at_once(isa: str, m: int, two_threads: None) -> None:
    work = [
        make_inputs(Case(m, 150, 320, 8, 64, torch.bfloat16), seed=1),
        make_inputs(Case(m + 3, 90, 513, 16, 32, torch.float32, double_quant=False), seed=2),
    ]
    alone = [run(inputs) for inputs in work]
    start = threading.Barrier(2)
    outcome: list[list[bool]] = [[], []]

    def repeat(index: int) -> None:
        start.wait()
        for _ in range(8):
            outcome[index].append(same(run(work[index]), alone[index]))

    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcome == [[True] * 8] * 2


def wait_for(pid: int, seconds: float) -> int:
    """The child's exit code; a child that hangs is ended and reported as -1."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_forked_child(two_threads: None) -> None:
    """libgomp's threads do not survive a fork: the child must neither wait for them nor give other bits."""
    inputs = make_inputs(Case(20, 300, 640, 16, 64, torch.bfloat16), seed=3)
    weight = torch.randn(200, 640)

    def everything() -> list[bytes]:
        return bits((*run(inputs), *op.nf4_quantize(weight, 64, True, True)))

    want = everything()  # the parent's pool is up and used
    child = os.fork()
    if child == 0:
        # Nothing of pytest's, and none of torch's own parallel operators, which do wait for the lost threads:
        # it says what it found by its exit code.
        try:
            os._exit(0 if everything() == want else 1)
        except BaseException:
            os._exit(2)
    assert wait_for(child, 60) == 0
    assert everything() == want


class Rows(Dataset):
    """Each item is computed by the ops in whatever process asks for it."""

    def __init__(self) -> None:
        self.inputs = make_inputs(Case(12, 120, 320, 8, 64, torch.bfloat16), seed=4)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> torch.Tensor:
        return op.nf4_linear(self.inputs.x[row : row + 1], *self.inputs.linear[1:])[0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_data_loader_workers(two_threads: None) -> None:
    rows = Rows()
    want = torch.stack([rows[i] for i in range(len(rows))])
    run(rows.inputs)
    loader = DataLoader(rows, batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=120)
    assert torch.equal(torch.cat(list(loader)), want)


def test_levels_are_forced_for_the_process_not_the_thread() -> None:
    seen = []
    with levels.use_isa("scalar"):
        thread = threading.Thread(target=lambda: seen.append(levels.current_isa()))
        thread.start()
        thread.join()
    assert seen == ["scalar"]
