"""PagedAdamW and PagedAdamW8bit: torch's losses and conventions, states in mapped files, a killed run."""

from __future__ import annotations

import copy
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bits import assert_same_bits
from needs import fsdp_on_cpus
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from worlds import World, worlds

import fastlora
from fastlora.paged_store import PagedStore

BOTH = (fastlora.PagedAdamW, fastlora.PagedAdamW8bit)
BIG = 1 << 15  # elements: their float32 moments are paged, and their 8-bit ones are not


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((BIG // 64, 64), (33, 7), (100,), (0, 4))
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def step(optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


def check_same_parameters(got: list[nn.Parameter], want: list[nn.Parameter]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same_bits(a.detach(), b.detach(), f"parameter {i}")


def losses_of(make, steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    optimizer = make(model.parameters(), lr=1e-2)
    x, y = torch.randn(32, 64), torch.randn(32, 64)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_losses_are_torch_s() -> None:
    torch.testing.assert_close(
        losses_of(fastlora.PagedAdamW), losses_of(torch.optim.AdamW), rtol=1e-5, atol=0
    )


def test_losses_in_8_bits_stay_close() -> None:
    got, want = losses_of(fastlora.PagedAdamW8bit), losses_of(torch.optim.AdamW)
    assert got[-1] < want[0] / 4
    torch.testing.assert_close(got[-1], want[-1], rtol=0.15, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_have_float32_moments(dtype: torch.dtype) -> None:
    """Torch's update of a float32 copy, rounded."""
    ours, theirs = parameters(dtype), [nn.Parameter(p.detach().float()) for p in parameters(dtype)]
    optimizer, reference = fastlora.PagedAdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for number in range(4):
        step(optimizer, number)
        for p, q in zip(ours, theirs, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.detach(), q.detach().to(dtype), rtol=2**-7, atol=0)
            assert (p.detach() != q.detach().to(dtype)).sum() <= p.numel() // 1000
            q.data = p.detach().float()
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.float32 for p in ours)


@pytest.mark.parametrize("make", BOTH)
def test_strides(make) -> None:
    """A parameter that is not contiguous, whose gradient lies otherwise."""
    pool = torch.randn(70, 100)
    want = nn.Parameter(pool.t()[:, :64].clone())
    got = nn.Parameter(pool.t()[:, :64].detach())
    assert not got.is_contiguous()
    for p in (got, want):
        optimizer = make([p], lr=0.1)
        for number in range(3):
            step(optimizer, number)
    assert_same_bits(got.detach(), want.detach(), "the strided parameter")
    assert got.stride() == (1, 100)


@pytest.mark.parametrize("make", BOTH)
def test_groups_closure_and_missing_gradients(make) -> None:
    a, b, c = parameters()[:3]
    before = c.detach().clone()
    optimizer = make([{"params": [a], "lr": 0.0, "weight_decay": 0.0}, {"params": [c]}])
    optimizer.add_param_group({"params": [b], "lr": 0.1})
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    start_a, start_b = a.detach().clone(), b.detach().clone()

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        return a.sum()

    assert optimizer.step(closure).item() == pytest.approx(start_a.sum().item())
    assert torch.equal(a, start_a)
    assert not torch.equal(b, start_b)
    assert torch.equal(c, before)
    assert c not in optimizer.state or not optimizer.state[c]


# --- state dicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", BOTH)
def test_state_dict_round_trip(make, dtype: torch.dtype, tmp_path: Path) -> None:
    straight, resumed = parameters(dtype), parameters(dtype)
    one = make(straight, lr=0.1)
    for number in range(3):
        step(one, number)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    for p, q in zip(resumed, straight, strict=True):
        p.data = q.detach().clone()
    other = make(resumed, lr=0.5)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert other.param_groups[0]["lr"] == 0.1
    for p, q in zip(resumed, straight, strict=True):
        for name, value in one.state[q].items():
            loaded = other.state[p][name]
            assert_same_bits(loaded, value, name)
            assert not value.numel() or loaded.data_ptr() != value.data_ptr()
    for number in range(3, 6):
        step(one, number)
        step(other, number)
    check_same_parameters(resumed, straight)


def test_state_dicts_are_torch_s() -> None:
    ours, theirs = parameters(), parameters()
    one, other = fastlora.PagedAdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    step(one, 0)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for p, q in zip(ours, theirs, strict=True):
        q.data = p.detach().clone()
    step(one, 1)
    step(other, 1)
    one.load_state_dict(other.state_dict())
    step(one, 2)
    step(other, 2)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", BOTH)
def test_copies_are_apart(make) -> None:
    optimizer = make(parameters(), lr=0.1)
    step(optimizer, 0)
    twin = copy.deepcopy(optimizer)
    step(optimizer, 1)
    step(twin, 1)
    check_same_parameters(twin.param_groups[0]["params"], optimizer.param_groups[0]["params"])
    p, q = twin.param_groups[0]["params"][0], optimizer.param_groups[0]["params"][0]
    assert all(twin.state[p][name].data_ptr() != t.data_ptr() for name, t in optimizer.state[q].items())


def changed_state(optimizer: torch.optim.Optimizer, **values: object) -> dict:
    state = copy.deepcopy(optimizer.state_dict())
    for name, value in values.items():
        if value is None:
            del state["state"][0][name]
        else:
            state["state"][0][name] = value
    return state


@pytest.mark.parametrize("make", BOTH)
def test_a_bad_state_dict_changes_nothing(make) -> None:
    optimizer = make(parameters(), lr=0.1)
    step(optimizer, 0)
    first = "exp_avg" if make is fastlora.PagedAdamW else "state1"
    kept = {name: t.clone() for name, t in optimizer.state[optimizer.param_groups[0]["params"][0]].items()}
    amsgrad = copy.deepcopy(optimizer.state_dict())
    amsgrad["param_groups"][0]["amsgrad"] = True
    for state, message in (
        (changed_state(optimizer, **{first: None}), f"expected a state with {first}"),
        (changed_state(optimizer, step=None), "expected a state with step"),
        (
            changed_state(optimizer, **{first: torch.zeros(3)}),
            rf"expected {first} of shape \(512, 64\), got \(3,\)",
        ),
        (amsgrad, "expected a state dict without amsgrad, got amsgrad=True"),
    ):
        with pytest.raises(ValueError, match=f"^{make.__name__}: {message}"):
            optimizer.load_state_dict(state)
        for name, t in optimizer.state[optimizer.param_groups[0]["params"][0]].items():
            assert_same_bits(t, kept[name], name)
    step(optimizer, 1)


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "expected lr from 0, got -1.0"),
        ({"eps": float("nan")}, "expected eps from 0, got nan"),
        ({"weight_decay": -0.1}, "expected weight_decay from 0, got -0.1"),
        ({"betas": (0.9, 1.0)}, r"expected betas of two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_numbers_out_of_range(make, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{make.__name__}: {message}"):
        make(parameters(), **options)


def test_options_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^PagedAdamW8bit: expected min_8bit_size from 0, got -1"):
        fastlora.PagedAdamW8bit(parameters(), min_8bit_size=-1)
    with pytest.raises(ValueError, match=r"^PagedStore: expected a directory that exists, got "):
        fastlora.PagedAdamW(parameters(), directory=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^PagedStore: expected resident_bytes of 1 or more, got 0"):
        fastlora.PagedAdamW(parameters(), resident_bytes=0)


@pytest.mark.parametrize("make", BOTH)
def test_bad_parameters_change_nothing(make) -> None:
    good = nn.Parameter(torch.ones(4))
    good.grad = torch.ones(4)
    sparse, double = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4).double())
    meta = nn.Parameter(torch.ones(4, device="meta"))
    sparse.grad = torch.ones(4).to_sparse()
    double.grad, meta.grad = torch.ones_like(double), torch.ones_like(meta)
    for bad, error, message in (
        (sparse, RuntimeError, "expected dense gradients, got one with layout torch.sparse_coo"),
        (double, TypeError, "expected parameters in float32, bfloat16 or float16, got torch.float64"),
        (meta, RuntimeError, "expected parameters on a CPU or a CUDA device, got one on meta"),
    ):
        optimizer = make([good, bad])
        with pytest.raises(error, match=f"^{make.__name__}: {message}"):
            optimizer.step()
        assert good.tolist() == [1.0] * 4


# --- the store --------------------------------------------------------------------------------------------


def mapped_kib(t: Tensor, what: str) -> int:
    """A figure of the mapping that `t` begins, from /proc/self/smaps."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("this system has no /proc/self/smaps")
    found = re.search(
        rf"^{t.data_ptr():x}-.*?^{what}:\s+(\d+) kB$", smaps.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found is not None, "no mapping begins at the tensor"
    return int(found[1])


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    store = PagedStore(tmp_path)
    t = store.zeros((300, 500), torch.float32)
    assert t.shape == (300, 500)
    assert t.is_contiguous()
    assert not t.any()
    assert not list(tmp_path.iterdir())
    assert store.zeros((0, 3), torch.uint8).shape == (0, 3)


def test_the_bound_unmaps_what_was_used_longest_ago(tmp_path: Path) -> None:
    store = PagedStore(tmp_path, resident_bytes=2 << 20)
    tensors = [store.zeros((1 << 18,), torch.float32) for _ in range(3)]
    for i, t in enumerate(tensors):
        t.fill_(i + 1)
        store.done_with(t)
    assert mapped_kib(tensors[0], "Rss") == 0
    assert mapped_kib(tensors[1], "Rss") >= 1024
    assert mapped_kib(tensors[2], "Rss") >= 1024
    store.will_need(tensors[0])
    assert all(bool((t == i + 1).all()) for i, t in enumerate(tensors))


def test_others_are_left_alone() -> None:
    store = PagedStore(resident_bytes=1)
    t = torch.ones(1 << 16)
    store.will_need(t)
    store.done_with(t)
    assert not store.owns(t)
    assert bool((t == 1).all())


@pytest.mark.parametrize("make", BOTH)
def test_a_bound_changes_no_bit(make, tmp_path: Path) -> None:
    free, bounded = parameters(), parameters()
    one = make(free, lr=0.1)
    other = make(bounded, lr=0.1, directory=tmp_path, resident_bytes=1)
    for number in range(5):
        step(one, number)
        step(other, number)
    check_same_parameters(bounded, free)


def test_where_states_lie() -> None:
    big, small = nn.Parameter(torch.ones(BIG)), nn.Parameter(torch.ones(100))
    optimizer = fastlora.PagedAdamW([big, small])
    step(optimizer, 0)
    assert optimizer._stores.cpu.owns(optimizer.state[big]["exp_avg"])
    assert not optimizer._stores.cpu.owns(optimizer.state[small]["exp_avg"])
    assert mapped_kib(optimizer.state[big]["exp_avg"], "Size") >= BIG * 4 // 1024


# --- a run that is killed ---------------------------------------------------------------------------------

RUN = """
import os, signal, sys
import torch, fastlora
make, folder, kill_at = getattr(fastlora, sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(64, 2048), torch.nn.Tanh(), torch.nn.Linear(2048, 64))
optimizer = make(model.parameters(), lr=1e-2, directory=folder)
x, y = torch.randn(16, 64), torch.randn(16, 64)
file, first = os.path.join(sys.argv[4], "checkpoint.pt"), 0
if os.path.exists(file):
    saved = torch.load(file)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    first = saved["next"]
if kill_at >= 0:  # in the middle of a step: when its second parameter comes
    done, update = [0], optimizer._update
    def killed(p, group):
        done[0] += 1
        if done[0] == 4 * kill_at + 2:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        update(p, group)
    optimizer._update = killed
for i in range(first, 8):
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    print(i, loss.item().hex(), flush=True)
    optimizer.step()
    if i % 3 == 2:
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "next": i + 1}
        torch.save(saved, file + ".new")
        os.replace(file + ".new", file)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("make", BOTH)
def test_a_killed_run_resumes(make, tmp_path: Path, monkeypatch, capsys, keep_threads: None) -> None:
    states = tmp_path / "states"
    states.mkdir()

    def arguments(kill_at: int, folder: str) -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        return [make.__name__, str(states), str(kill_at), str(tmp_path / folder)]

    def run(folder: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["-c", *arguments(-1, folder)])
        exec(compile(RUN, "RUN", "exec"), {})
        return capsys.readouterr().out.splitlines()

    want = run("straight")
    assert len(want) == 8
    command = [sys.executable, "-c", RUN, *arguments(4, "killed")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.splitlines() == want[:5]
    assert not list(states.iterdir())
    assert run("killed") == want[3:]


# --- several processes ------------------------------------------------------------------------------------

world = worlds(2)


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 513), nn.Tanh(), nn.Linear(513, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """The same batch on every rank, so that every way of training has the same gradients."""
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        optimizer.zero_grad()
        model(torch.randn(8, 64, generator=generator)).square().mean().backward()
        optimizer.step()


def sharded_and_replicated(rank: int, name: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    make = getattr(fastlora, name)
    want, sharded, replicated = model_of(), model_of(), nn.parallel.DistributedDataParallel(model_of())
    fully_shard(sharded)
    for model in (want, sharded, replicated):
        train(model, make(model.parameters(), lr=1e-2), 0, 4)
    for p, q, r in zip(want.parameters(), replicated.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
        if make is fastlora.PagedAdamW:
            torch.testing.assert_close(r.full_tensor(), p, rtol=1e-5, atol=1e-6)
        else:  # blocks of 256 begin anew in each shard
            torch.testing.assert_close(r.full_tensor(), p, rtol=0, atol=2e-2)


@pytest.mark.parametrize("make", BOTH)
@fsdp_on_cpus
def test_fsdp_and_ddp(world: World, make) -> None:
    world.run(sharded_and_replicated, make.__name__)


def checkpointed(rank: int) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    first, second = model_of(), model_of()
    for model in (first, second):
        fully_shard(model)
    one = fastlora.PagedAdamW(first.parameters(), lr=1e-2)
    other = fastlora.PagedAdamW(second.parameters(), lr=1e-2)
    train(first, one, 0, 3)
    full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = get_optimizer_state_dict(first, one, options=full)
    if rank == 0:
        assert state["state"]["0.weight"]["exp_avg"].shape == (513, 64)
    second.load_state_dict(first.state_dict())
    set_optimizer_state_dict(second, other, state, options=full)
    train(first, one, 3, 5)
    train(second, other, 3, 5)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert_same_bits(q.to_local().detach(), p.to_local().detach(), "a shard")


@fsdp_on_cpus
def test_state_dicts_of_distributed_checkpoints(world: World) -> None:
    world.run(checkpointed)


def shards_of_8_bits(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    model = model_of()
    fully_shard(model)
    optimizer = fastlora.PagedAdamW8bit(model.parameters(), lr=1e-2)
    train(model, optimizer, 0, 2)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    for p in model.parameters():
        if "state1" in optimizer.state[p]:
            assert_same_bits(optimizer.state[p]["state1"], state["state"][0]["state1"], "codes")
    state["state"][0]["shard"][-2] += 1  # the offset of another rank
    with pytest.raises(ValueError, match=r"^PagedAdamW8bit: expected the state of this rank's shard"):
        optimizer.load_state_dict(state)


@fsdp_on_cpus
def test_8_bit_states_belong_to_their_shard(world: World) -> None:
    world.run(shards_of_8_bits)
