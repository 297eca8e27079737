"""QExperts under FSDP2 and DDP: two gloo processes on this machine."""

import pytest
import torch
from needs import fsdp_of_bytes
from torch import distributed, nn

import fastlora

pytestmark = pytest.mark.skipif(
    not distributed.is_gloo_available(), reason="this torch was built without gloo"
)
WORLD = 2


def layer(experts):
    torch.manual_seed(0)
    made = fastlora.QExperts(experts, 33, 17, rank=2, alpha=4)
    for p in made.adapter_parameters():
        nn.init.normal_(p, std=0.2)
    return made


def batch(rank, experts):
    g = torch.Generator().manual_seed(rank)
    index = torch.randint(experts, (6, 2), generator=g)
    return torch.randn(6, 33, generator=g), index, torch.rand(6, 2, generator=g)


def worker(rank, path):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    try:
        for experts in (3, 1):  # uneven, and fewer experts than ranks
            check(rank, experts)
    finally:
        distributed.destroy_process_group()


def check(rank, experts):
    from torch.distributed.fsdp import fully_shard

    reference = layer(experts)
    for other in range(WORLD):
        reference(*batch(other, experts)).square().mean().div(WORLD).backward()
    sharded = layer(experts)
    fully_shard(sharded)
    parallel = nn.parallel.DistributedDataParallel(layer(experts))
    wanted = dict(reference.named_parameters())
    for model in (sharded, parallel):
        y = model(*batch(rank, experts))
        assert torch.equal(y, reference(*batch(rank, experts)))
        y.square().mean().backward()
    for name, p in sharded.named_parameters():
        if p.dtype == torch.uint8:
            assert torch.equal(p.full_tensor(), wanted[name])
            assert p.to_local().shape[0] == len(range(experts)[rank::WORLD])  # whole experts
        else:
            torch.testing.assert_close(p.grad.full_tensor(), wanted[name].grad, rtol=1e-5, atol=1e-7)
            other = parallel.module.get_parameter(name)
            torch.testing.assert_close(other.grad, wanted[name].grad, rtol=1e-5, atol=1e-7)


@fsdp_of_bytes
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path / "store"),), nprocs=WORLD)
