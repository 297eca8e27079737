"""QLinear under DDP and FSDP2: what several ranks learn is what one process learns."""

import contextlib
import copy
import pickle

import pytest
import torch
from distributed_cases import (
    batch,
    layers,
    loss_in_bfloat16,
    loss_of,
    net,
    optimizer_of,
    shard,
    sync_always,
    train_alone,
    train_together,
    whole,
)
from needs import fsdp_of_bytes
from tolerances import relative_error
from torch import distributed, nn
from worlds import worlds

import fastlora

world = worlds(2, 3)


def parity(got, reference, losses, want, tolerance):
    assert losses == pytest.approx(want, rel=tolerance), f"{losses} is not {want}"
    assert losses[-1] < losses[0]
    for (name, p), alone in zip(got.named_parameters(), reference.parameters(), strict=True):
        mine = whole(p.detach())
        if alone.dtype == torch.uint8:
            assert torch.equal(mine, alone), name
        else:
            assert mine.dtype == alone.dtype
            assert relative_error(mine, alone) < 10 * tolerance, name


@contextlib.contextmanager
def sync_at_the_end(model, last):
    if isinstance(model, nn.parallel.DistributedDataParallel):
        with contextlib.nullcontext() if last else model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(last)
        yield


# --- replicated -------------------------------------------------------------------------------------------


def ddp(rank, micro, views):
    size = distributed.get_world_size()
    reference = net()
    want = train_alone(reference, size, micro)
    model = nn.parallel.DistributedDataParallel(net(), gradient_as_bucket_view=views)
    losses = train_together(model, rank, size, micro=micro, waits=sync_at_the_end)
    parity(model.module, reference, losses, want, 1e-5)


@pytest.mark.parametrize(("micro", "views"), [(1, False), (2, True)])
def test_replicas_learn_what_one_process_learns(world, micro, views):
    world.run(ddp, micro, views)


# --- sharded ----------------------------------------------------------------------------------------------


def fsdp(rank, by_layer, reshard, micro, waits, param_dtype, tolerance):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    size = distributed.get_world_size()
    reference = net()
    want = train_alone(reference, size, micro, call=loss_in_bfloat16 if param_dtype else loss_of)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=param_dtype and torch.float32)
    model = shard(net(), by_layer=by_layer, mp_policy=policy, reshard_after_forward=reshard)
    for name, p in model.named_parameters():
        assert type(p).__name__ == "DTensor", name
        assert p.to_local().shape[0] <= -(-p.shape[0] // size), name
    losses = train_together(model, rank, size, micro=micro, waits=waits)
    parity(model, reference, losses, want, tolerance)


@pytest.mark.parametrize(
    ("by_layer", "reshard", "micro", "waits", "param_dtype", "tolerance"),
    [
        (True, True, 1, sync_always, None, 1e-5),
        (True, False, 2, sync_at_the_end, None, 1e-5),
        (False, True, 2, sync_always, None, 1e-5),
        (False, False, 1, sync_always, None, 1e-5),
        (True, True, 2, sync_at_the_end, torch.bfloat16, 1e-3),
        (False, False, 1, sync_always, torch.bfloat16, 1e-3),
    ],
)
@fsdp_of_bytes
def test_shards_learn_what_one_process_learns(world, by_layer, reshard, micro, waits, param_dtype, tolerance):
    """Whatever is one group of parameters, stays gathered, and is accumulated."""
    world.run(fsdp, by_layer, reshard, micro, waits, param_dtype, tolerance)


def net_with_offsets():
    model = net()
    for layer in layers(model):
        values = 0.01 * torch.randn(layer.out_features, 7)
        layer._set_base(layer.quantized_weight.with_offsets(values))
    return model


def offsets(rank):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    size = distributed.get_world_size()
    reference = net_with_offsets()
    want = train_alone(reference, size)
    model = shard(net_with_offsets())
    assert model.head.weight_offsets.to_local().shape[0] < 33
    losses = train_together(model, rank, size)
    parity(model, reference, losses, want, 1e-5)
    everything = StateDictOptions(full_state_dict=True)
    full = get_model_state_dict(model, options=everything)
    assert torch.equal(full["head.weight_offsets"], reference.head.weight_offsets)
    with pytest.raises(RuntimeError, match="expected no weight_offsets for a sharded layer that has none"):
        shard(net()).load_state_dict(full)
    other = net_with_offsets()
    for layer in layers(other):
        layer.weight_offsets.data.zero_()
    other = shard(other)
    set_model_state_dict(other, full, options=everything)
    with torch.no_grad():
        torch.testing.assert_close(other(batch(9, 0)), reference(batch(9, 0)), rtol=1e-3, atol=1e-3)
    for layer in layers(other):
        layer.reset_parameters()
        assert not whole(layer.weight_offsets).any()


@fsdp_of_bytes
def test_offsets_are_sharded_by_rows(world):
    world.run(offsets)


def checkpointed(rank):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    size = distributed.get_world_size()

    def dropping():
        model = net()
        for layer in layers(model):
            layer.dropout = 0.25
        return model

    model, again = dropping(), dropping()
    for i, block in enumerate(again.blocks):
        again.blocks[i] = checkpoint_wrapper(block)
    losses = []
    for one in (model, again):
        shard(one)
        torch.manual_seed(7 + rank)  # dropout's
        losses.append(train_together(one, rank, size))
    assert losses[0] == losses[1]
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())


@fsdp_of_bytes
def test_checkpointing_shards_changes_no_bit(world):
    """Gradient checkpointing gathers a block once more and draws its dropout again."""
    world.run(checkpointed)


# --- several adapters -------------------------------------------------------------------------------------

ADDED = (("a", 3), ("b", 5), ("idle", 2))


def net_of_many():
    model = net()
    torch.manual_seed(1)
    for layer in layers(model):
        for name, rank in ADDED:
            nn.init.normal_(layer.add_adapter(name, rank, 4).lora_B, std=0.1)
    return model


def names_of(rank):
    """Of a rank's rows. No two ranks have the same adapters in their batches, and nobody has "idle"."""
    return [["a", "a", None] * 2, ["default", "b", "a"] * 2, ["b"] * 6][rank]


def routed(model, x, rank):
    with fastlora.adapters(model, names_of(rank)):
        return loss_of(model, x)


def many(rank, wrap):
    size = distributed.get_world_size()
    reference = net_of_many()
    want = train_alone(reference, size, call=routed)
    model = wrap(net_of_many())
    optimizer = optimizer_of(model, fused=wrap is with_views)
    with torch.no_grad():
        model(batch(0, 0))  # whatever stays gathered after it does so when the batch is routed
    losses = train_together(model, rank, size, call=routed, optimizer=optimizer)
    parity(model, reference, losses, want, 1e-5)
    for layer in (*layers(model), *layers(reference)):
        layer.set_adapter("b")
    torch.testing.assert_close(model(batch(9, 0)), reference(batch(9, 0)), rtol=1e-3, atol=1e-3)


def replicated(model):
    return nn.parallel.DistributedDataParallel(model)


def with_views(model):
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def sharded_apart(model):
    for layer in layers(model):
        layer.lay_apart()
    return shard(model)


def left_whole_apart(model):
    for layer in layers(model):
        layer.lay_apart()
    return shard(model, by_layer=False, reshard_after_forward=False)


@pytest.mark.parametrize(
    "wrap",
    [
        replicated,
        with_views,
        pytest.param(sharded_apart, marks=fsdp_of_bytes),
        pytest.param(left_whole_apart, marks=fsdp_of_bytes),
    ],
)
def test_ranks_with_other_adapters_in_their_batches(world, wrap):
    world.run(many, wrap)


def own_adapter_in_a_block(rank):
    """A layer's own adapter, routed, needs no preparation; not even where the model is gathered just then."""
    for by_layer in (True, False):
        reference = net()
        model = shard(net(), by_layer=by_layer, reshard_after_forward=False)
        with torch.no_grad():
            model(batch(0, 0))
            for one in (reference, model):
                with fastlora.adapters(one, ["default", None] * 3):
                    y = one(batch(0, 0))
                if one is reference:
                    want = y
            torch.testing.assert_close(y, want)
        # What was routed while it was gathered follows the shards.
        model.reshard()
        for one in (reference, model):
            one.head.lora_B.detach().mul_(2)
            with torch.no_grad(), fastlora.adapters(one, ["default", None] * 3):
                y = one(batch(0, 0))
            if one is reference:
                want = y
        torch.testing.assert_close(y, want)


@fsdp_of_bytes
def test_own_adapters_are_routed_in_shards(world):
    world.run(own_adapter_in_a_block)


def refusals(rank, directory):
    model = shard(net())
    layer = model.head
    for call, op in (
        (lambda: layer.add_adapter("a", 3, 4), "add_adapter"),
        (
            lambda: layer.replace_adapter("default", torch.ones(2, 70), torch.ones(33, 2), 4),
            "replace_adapter",
        ),
    ):
        with pytest.raises(RuntimeError, match=f"{op}: expected a layer whose parameters are whole, got"):
            call()
    with pytest.raises(RuntimeError, match="merge: expected a layer whose parameters are whole, got a shard"):
        layer.merge()
    plain = net_of_many()
    path = f"{directory}-{rank}"
    fastlora.save_adapter(plain, path, name="a")
    with pytest.raises(RuntimeError, match="load_adapter: expected whole layers, got 5 that are not"):
        fastlora.load_adapter(model, path, name="a")
    for grad in (torch.enable_grad, torch.no_grad):
        with grad(), pytest.raises(RuntimeError, match="nf4_linear: expected a whole weight, got a sharded"):
            layer(batch(0, 0))  # the model's parameters, of which nobody has asked the model
    layer = sharded_apart(net_of_many()).head
    layer.set_adapter("b")
    with pytest.raises(
        RuntimeError, match="nf4_multi_lora_linear: expected a whole weight, got a sharded one"
    ):
        layer(batch(0, 0))
    with pytest.raises(NotImplementedError, match="non-contiguous"):  # torch's, without lay_apart()
        shard(net_of_many())
    with pytest.raises(RuntimeError, match="delete_adapter: expected a layer whose parameters are whole"):
        layer.delete_adapter("a")


@fsdp_of_bytes
def test_what_shards_refuse(world, tmp_path):
    world.run(refusals, str(tmp_path / "adapter"))


# --- adapters' files --------------------------------------------------------------------------------------


def files(rank, directory):
    """What wrapped models save fits the plain one, and the other way round."""
    want, directory = net(), f"{directory}-{rank}"
    for wrapped in (replicated(net()), shard(net())):
        fastlora.save_adapter(wrapped, directory)
        plain = net(seed=1)
        plain.load_state_dict({k: v for k, v in want.state_dict().items() if "lora" not in k}, strict=False)
        fastlora.load_adapter(plain, directory)
        for got, expected in zip(plain.parameters(), want.parameters(), strict=True):
            assert torch.equal(got, expected)
        nn.init.ones_(plain.head.lora_B)
        fastlora.save_adapter(plain, directory)
        with torch.no_grad():
            wrapped(batch(0, 0))  # which leaves the head gathered; what is loaded must reach its shards
        fastlora.load_adapter(wrapped, directory)
        for got, expected in zip(wrapped.parameters(), plain.parameters(), strict=True):
            assert torch.equal(whole(got), expected)


@fsdp_of_bytes
def test_adapters_files_fit_every_wrapping(world, tmp_path):
    world.run(files, str(tmp_path / "adapter"))


def named_files(rank, directory):
    """A named adapter out of a sharded model, and back into another."""
    directory = f"{directory}-{rank}"
    model, reference = sharded_apart(net_of_many()), net_of_many()
    with torch.no_grad():
        for layer in (*layers(model), *layers(reference)):
            layer.adapters["b"].lora_A.mul_(2)
    fastlora.save_adapter(model, directory, name="b")
    other = sharded_apart(net_of_many())
    fastlora.load_adapter(other, directory, name="b")
    for got, want in zip(other.parameters(), reference.parameters(), strict=True):
        assert torch.equal(whole(got), want)


@fsdp_of_bytes
def test_named_adapters_go_through_files(world, tmp_path):
    world.run(named_files, str(tmp_path / "adapter"))


# --- parameters that a fused op meets in pieces -----------------------------------------------------------


class Leaf(nn.Linear):
    """A LoRA leaf as PEFT has them, which FSDP2 may wrap by itself."""


class Fused(nn.Module):
    """A layer that reads its leaves' weights and never calls them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = fastlora.QLinear(70, 49, rank=0)
        self.lora_A, self.lora_B = Leaf(70, 5, bias=False), Leaf(5, 49, bias=False)
        self.dropout = 0.0

    def forward(self, x):
        base = self.base
        a, b = self.lora_A.weight, self.lora_B.weight
        return fastlora.nf4_linear(x, base.quantized_weight, base.bias, a, b, 2.0, dropout=self.dropout)


def leaves(rank):
    from torch.distributed.fsdp import fully_shard

    size = distributed.get_world_size()
    for waits in (sync_always, sync_at_the_end):
        reference = Fused()
        want = train_alone(reference, size, 2)
        model = Fused()
        for leaf in (model.lora_A, model.lora_B, model):
            fully_shard(leaf)
        losses = train_together(model, rank, size, micro=2, waits=waits)
        parity(model, reference, losses, want, 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(batch(5, 0)), reference(batch(5, 0)), rtol=1e-4, atol=1e-4)
        for one in (model, reference):
            one.dropout = 0.5
        x = batch(5, 0)
        torch.manual_seed(3)
        y = model(x)
        torch.manual_seed(3)
        torch.testing.assert_close(y, reference(x), rtol=1e-4, atol=1e-4)


@fsdp_of_bytes
def test_leaves_that_are_wrapped_one_by_one(world):
    """The op gathers what FSDP2 did not; the gradients are the mean over the ranks all the same."""
    world.run(leaves)


def wrapped_adapters(rank):
    """FSDP2 around each adapter of a layer, whose forward nobody calls."""
    from torch.distributed.fsdp import fully_shard

    size = distributed.get_world_size()
    reference, model = net_of_many(), net_of_many()

    for layer in layers(model):
        layer.lay_apart()
        for adapter in layer.adapters.values():
            fully_shard(adapter)
    shard(model)
    total = sum(routed(reference, batch(0, other), other) for other in range(size)) / size
    total.backward()
    routed(model, batch(0, rank), rank).backward()
    for (name, p), want in zip(model.named_parameters(), reference.parameters(), strict=True):
        if want.grad is not None:
            torch.testing.assert_close(
                whole(p.grad), want.grad, msg=lambda text, name=name: f"{name}: {text}"
            )


@fsdp_of_bytes
def test_adapters_that_are_wrapped_one_by_one(world):
    world.run(wrapped_adapters)


def test_lay_apart_in_one_process():
    """It changes no result, keeps the Parameters, and leaves pickling and copying as they were."""
    model, reference = net_of_many(), net_of_many()
    for plain in (fastlora.QLinear(64, 64), fastlora.QLinear(64, 64, rank=0)):
        plain.lay_apart()
        assert not plain.lies_apart  # nothing to do, and it stays as quick as it was
    held = [p for layer in layers(model) for name in ("default", "a") for p in layer.adapter(name)[:2]]
    for layer in layers(model):
        layer.lay_apart()
        layer.lay_apart()
    now = [p for layer in layers(model) for name in ("default", "a") for p in layer.adapter(name)[:2]]
    assert all(p is q for p, q in zip(held, now, strict=True))
    assert all(p.is_contiguous() for p in model.parameters())
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with fastlora.adapters(one, names_of(1)), fastlora.adapters(reference, names_of(1)):
            torch.testing.assert_close(one(batch(0, 0)), reference(batch(0, 0)))
    head = model.head
    head.adapters["a"].set_alpha(8)
    reference.head.adapters["a"].set_alpha(8)
    with fastlora.adapters(model, ["a"] * 6), fastlora.adapters(reference, ["a"] * 6):
        torch.testing.assert_close(model(batch(0, 0)), reference(batch(0, 0)))
    with pytest.raises(RuntimeError, match="add_adapter: expected a layer whose parameters are whole"):
        head.add_adapter("c", 2, 4)
    with (
        fastlora.adapters(reference, ["a"] * 6),
        pytest.raises(RuntimeError, match="lay_apart: expected to be"),
    ):
        reference.head.lay_apart()
