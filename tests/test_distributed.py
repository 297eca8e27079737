"""QLinear under FSDP2 and DDP: two gloo processes on this machine."""

import copy

import pytest
import torch
from tolerances import relative_error
from torch import distributed, nn

import fastlora

pytestmark = pytest.mark.skipif(
    not distributed.is_gloo_available(), reason="this torch was built without gloo"
)
WORLD = 2


def model():
    torch.manual_seed(0)
    # Odd sizes: rows that do not divide evenly among the ranks.
    model = nn.Sequential(fastlora.QLinear(70, 49, rank=4), nn.ReLU(), fastlora.QLinear(49, 33, rank=4))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B, std=0.3)
    return model


def loss(model, x):
    return model(x).float().square().mean()


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def worker(rank, path):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    try:
        fsdp(rank)
        ddp(rank)
        adapters(rank, f"{path}-adapter-{rank}")
        many(rank)
    finally:
        distributed.destroy_process_group()


def fsdp(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    x = torch.randn(6, 70, generator=torch.Generator().manual_seed(rank))
    reference = model()
    for other in range(WORLD):
        loss(reference, torch.randn(6, 70, generator=torch.Generator().manual_seed(other))).div(
            WORLD
        ).backward()
    mesh = init_device_mesh("cpu", (WORLD,))
    for policy, tolerance in (
        (MixedPrecisionPolicy(), 1e-6),
        (MixedPrecisionPolicy(param_dtype=torch.bfloat16), 1e-2),
    ):
        sharded = model()
        for module in (sharded[0], sharded[2], sharded):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        loss(sharded, x).backward()
        for (name, got), want in zip(sharded.named_parameters(), reference.parameters(), strict=True):
            if want.dtype == torch.uint8:
                assert type(got).__name__ == "DTensor", name
                assert got.to_local().shape[0] <= -(-want.shape[0] // WORLD), name
                assert torch.equal(whole(got), want), name
            else:
                error = relative_error(whole(got.grad), want.grad)
                assert error < tolerance, f"{policy}: {name} is off by {error:.2g}"


def ddp(rank):
    plain, inputs = (
        model(),
        [torch.randn(6, 70, generator=torch.Generator().manual_seed(r)) for r in range(WORLD)],
    )
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    loss(wrapped, inputs[rank]).backward()
    for x in inputs:
        loss(plain, x).div(WORLD).backward()
    for got, want in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None)
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad)


def adapters(rank, directory):
    """What wrapped models save fits the plain one, and the other way round."""
    from torch.distributed.fsdp import fully_shard

    want = model()
    sharded = model()
    for module in (sharded[0], sharded[2], sharded):
        fully_shard(module)
    for wrapped in (nn.parallel.DistributedDataParallel(model()), sharded):
        fastlora.save_adapter(wrapped, directory)
        plain = model()
        for p in (plain[0].lora_A, plain[0].lora_B, plain[2].lora_A, plain[2].lora_B):
            nn.init.zeros_(p)
        fastlora.load_adapter(plain, directory)
        for got, expected in zip(plain.parameters(), want.parameters(), strict=True):
            assert torch.equal(got, expected)
        nn.init.ones_(plain[2].lora_B)
        fastlora.save_adapter(plain, directory)
        fastlora.load_adapter(wrapped, directory)
        for got, expected in zip(wrapped.parameters(), plain.parameters(), strict=True):
            assert torch.equal(whole(got), expected)


def many(rank):
    """A replicated model whose ranks have other adapters in their batches, some of them in none."""

    def with_adapters():
        torch.manual_seed(1)
        made = model()
        for layer in (made[0], made[2]):
            for name, r in (("a", 3), ("b", 5), ("idle", 2)):
                nn.init.normal_(layer.add_adapter(name, r, 4).lora_B, std=0.3)
        return made

    names = [["a", "a", None], ["default", "b", "a"]]
    inputs = [torch.randn(3, 70, generator=torch.Generator().manual_seed(r)) for r in range(WORLD)]
    plain = with_adapters()
    for x, rows in zip(inputs, names, strict=True):
        with fastlora.adapters(plain, rows):
            loss(plain, x).div(WORLD).backward()
    for views in (False, True):
        wrapped = nn.parallel.DistributedDataParallel(with_adapters(), gradient_as_bucket_view=views)
        optimizer = torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), fused=True)
        with fastlora.adapters(wrapped, names[rank]):
            loss(wrapped, inputs[rank]).backward()
        for got, want in zip(wrapped.parameters(), plain.parameters(), strict=True):
            if want.dtype != torch.uint8:
                torch.testing.assert_close(got.grad, want.grad)
        optimizer.step()
        table = wrapped.module[0].join_table()
        assert torch.equal(table.parameters("a")[0][0], wrapped.module[0].adapters["a"].lora_A)
    refused(model(), lambda sharded: sharded[0].add_adapter("a", 3, 4))
    refused(model(), lambda sharded: fastlora.adapters(sharded, ["default"]).__enter__())


def refused(sharded, call):
    from torch.distributed.fsdp import fully_shard

    fully_shard(sharded)
    with pytest.raises(RuntimeError, match="expected whole parameters, got sharded ones"):
        call(sharded)


def test_two_processes_get_the_gradients_of_one(tmp_path):
    """Sharded (FSDP2, in float32 and in mixed precision) and replicated (DDP)."""
    torch.multiprocessing.spawn(worker, args=(tmp_path / "rendezvous",), nprocs=WORLD)
