"""State dicts of sharded QLinear models, whole and in pieces: what goes through them is the same bits."""

import pytest
import torch
from distributed_cases import (
    assert_same_bits,
    batch,
    layers,
    loss_of,
    net,
    optimizer_of,
    shard,
    train_together,
    whole,
)
from needs import fsdp_of_bytes
from torch import distributed, nn
from worlds import worlds

import fastlora

state_dict = pytest.importorskip(
    "torch.distributed.checkpoint.state_dict", reason="this torch was built without torch.distributed"
)
world = worlds(2, 3)
two, three = worlds(2), worlds(3)
EVERYTHING = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


def trained(rank):
    """A sharded model after two steps, and its optimiser."""
    model = shard(net())
    optimizer = optimizer_of(model)
    train_together(model, rank, distributed.get_world_size(), steps=2, optimizer=optimizer)
    return model, optimizer


def other_values(model):
    """Neither base nor adapters of `net`."""
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3)
    return model


def save(model, optimizer, path):
    from torch.distributed import checkpoint

    states = state_dict.get_state_dict(model, optimizer)
    checkpoint.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=path)


def load(model, optimizer, path):
    from torch.distributed import checkpoint

    states = state_dict.get_state_dict(model, optimizer)
    held = dict(zip(("model", "optimizer"), states, strict=True))
    checkpoint.load(held, checkpoint_id=path)
    state_dict.set_state_dict(
        model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"]
    )


def moments(model, optimizer):
    """The optimiser's state by the parameters' names, gathered."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}.{key}": whole(t)
        for group in optimizer.param_groups
        for p in group["params"]
        for key, t in optimizer.state[p].items()
    }


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key, t in want.items():
        assert torch.equal(got[key], t), key


# --- in pieces --------------------------------------------------------------------------------------------


def write(rank, path):
    model, optimizer = trained(rank)
    save(model, optimizer, path)
    kept = {name: whole(p.detach()) for name, p in model.named_parameters()}, moments(model, optimizer)
    if rank == 0:
        torch.save(kept, f"{path}.pt")


def read(rank, path, by_layer=True):
    """Into a world of any size, sharded in any way; it goes on as one that never stopped."""
    want, states = torch.load(f"{path}.pt")
    model = shard(other_values(net()), by_layer=by_layer)
    optimizer = optimizer_of(model)
    load(model, optimizer, path)
    assert_same({name: whole(p.detach()) for name, p in model.named_parameters()}, want)
    assert_same(moments(model, optimizer), states)
    loss_of(model, batch(2, 0)).backward()
    optimizer.step()
    after = {name: whole(p.detach()) for name, p in model.named_parameters()}
    if rank == 0:
        assert_same_step(after, want, states)


def assert_same_step(after, want, states):
    """One process from the same states, in a step over the same rows."""
    alone = net()
    alone.load_state_dict(want)
    optimizer = optimizer_of(alone)
    loss_of(alone, batch(2, 0)).backward()
    for name, p in alone.named_parameters():
        if p.requires_grad:
            optimizer.state[p] = {
                key: states[f"{name}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
            }
    optimizer.step()
    for name, p in alone.named_parameters():
        torch.testing.assert_close(after[name], p.detach(), rtol=1e-4, atol=1e-5)


@fsdp_of_bytes
def test_pieces_of_three_ranks_fit_two_and_one(three, two, tmp_path):
    path = str(tmp_path / "checkpoint")
    three.run(write, path)
    two.run(read, path)
    two.run(read, path, False)
    want, states = torch.load(f"{path}.pt")
    model = other_values(net())
    optimizer = optimizer_of(model)
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        load(model, optimizer, path)
    assert_same({name: p.detach() for name, p in model.named_parameters()}, want)
    assert_same(moments(model, optimizer), states)


@fsdp_of_bytes
def test_pieces_come_back(world, tmp_path):
    path = str(tmp_path / "checkpoint")
    world.run(write, path)
    world.run(read, path)


def split_pieces(rank, path):
    """A tensor-parallel model writes, a sharded one reads, and the other way round."""
    from torch.distributed import checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from fastlora.integrations.tensor_parallel import ColwiseQLinear, RowwiseQLinear

    def made():
        torch.manual_seed(0)
        return nn.Sequential(
            fastlora.QLinear(384, 65, rank=3), fastlora.QLinear(65, 384), fastlora.QLinear(384, 9)
        )

    def split(model):
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        return parallelize_module(model, mesh, {"0": ColwiseQLinear(), "2": RowwiseQLinear()})

    def sharded(model):
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model)

    for i, (first, second) in enumerate([(split, sharded), (sharded, split)]):
        states = state_dict.get_model_state_dict(first(made()))
        checkpoint.save(states, checkpoint_id=f"{path}-{i}")
        model = second(other_values(made()))
        states = state_dict.get_model_state_dict(model)
        checkpoint.load(states, checkpoint_id=f"{path}-{i}")
        state_dict.set_model_state_dict(model, states)
        assert_same_bits(model, made())


@fsdp_of_bytes
def test_pieces_fit_another_kind_of_parallelism(world, tmp_path):
    world.run(split_pieces, str(tmp_path / "checkpoint"))


# --- whole ------------------------------------------------------------------------------------------------


def whole_states(rank):
    model, optimizer = trained(rank)
    full = state_dict.get_model_state_dict(model, options=EVERYTHING)
    states = state_dict.get_optimizer_state_dict(model, optimizer, options=EVERYTHING)
    want = {name: whole(p.detach()) for name, p in model.named_parameters()}
    expected = moments(model, optimizer)
    assert_same(full, want if rank == 0 else {})  # offloaded, the first rank has them
    if rank == 0:
        alone = net(seed=1)
        alone.load_state_dict(full)  # strict: the keys are those of one process
        assert_same(alone.state_dict(), want)
    held = [full, states]
    for from_rank_0 in (True, False):
        if not from_rank_0:
            distributed.broadcast_object_list(held)
        options = state_dict.StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank_0)
        again = shard(other_values(net()), by_layer=from_rank_0)
        fresh = optimizer_of(again)
        state_dict.set_model_state_dict(again, dict(held[0]), options=options)
        state_dict.set_optimizer_state_dict(again, fresh, held[1], options=options)
        assert_same({name: whole(p.detach()) for name, p in again.named_parameters()}, want)
        assert_same(moments(again, fresh), expected)


@fsdp_of_bytes
def test_whole_states_come_back(world):
    """Gathered on a CPU, as one process keeps them, and dealt out again."""
    world.run(whole_states)


def whole_states_of_many(rank):
    def made():
        model = net()
        torch.manual_seed(1)
        for layer in layers(model):
            nn.init.normal_(layer.add_adapter("a", 3, 4).lora_B)
            layer.lay_apart()
        return model

    want = made().state_dict()
    model = shard(other_values(made()))
    options = state_dict.StateDictOptions(full_state_dict=True)
    state_dict.set_model_state_dict(model, dict(want), options=options)
    assert_same(state_dict.get_model_state_dict(model, options=options), want)
    with (
        fastlora.adapters(model, ["a", None, "default"] * 2),
        fastlora.adapters(whole_one := made(), ["a", None, "default"] * 2),
    ):
        torch.testing.assert_close(model(batch(0, 0)), whole_one(batch(0, 0)))


@fsdp_of_bytes
def test_states_of_several_adapters(world):
    world.run(whole_states_of_many)


# --- from nothing -----------------------------------------------------------------------------------------


def from_meta(rank, path):
    reference = net()
    with torch.device("meta"):
        empty = net()
    assert all(p.is_meta for p in empty.parameters())
    model = shard(empty)
    model.to_empty(device="cpu")
    options = state_dict.StateDictOptions(full_state_dict=True)
    state_dict.set_model_state_dict(model, reference.state_dict(), options=options)
    assert_same_bits(model, reference)
    with torch.no_grad():
        torch.testing.assert_close(model(batch(0, 0)), reference(batch(0, 0)))
    with torch.device("meta"):
        other = net()
    shard(other).load_state_dict(model.state_dict(), assign=True)
    assert_same_bits(other, reference)


def drawn_again(rank):
    """reset_parameters in place of a checkpoint, as torch's recipe for meta models has it."""
    with torch.device("meta"):
        model = net()
    shard(model).to_empty(device="cpu")
    torch.manual_seed(rank)  # a base that no two ranks draw alike, if each were to draw its own
    for layer in layers(model):
        layer.reset_parameters()
    bits = [whole(p.detach()) for p in model.parameters()]
    for t in bits:
        first = t.clone()
        distributed.broadcast(first, src=0)
        assert torch.equal(t, first)
    for layer in layers(model):
        dense = layer.dequantize(torch.float32)
        assert 0.5 < dense.abs().max() * layer.in_features**0.5 < 1.5  # as nn.Linear draws it
        assert whole(layer.lora_B.detach()).count_nonzero() == 0
        assert 0 < whole(layer.lora_A.detach()).abs().max() <= layer.in_features**-0.5


@fsdp_of_bytes
def test_meta_models_are_sharded_first_and_filled_then(world, tmp_path):
    world.run(from_meta, str(tmp_path))


@fsdp_of_bytes
def test_sharded_layers_can_be_drawn_again(world):
    world.run(drawn_again)
