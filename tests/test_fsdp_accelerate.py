"""A QLinear model through accelerate's FSDP2 path, and PEFT's leaves, which it may wrap one by one."""

from importlib.util import find_spec

import pytest
import torch
from distributed_cases import (
    assert_same_bits,
    layers,
    net,
    optimizer_of,
    train_alone,
    train_together,
    whole,
)
from needs import fsdp_of_bytes
from tolerances import relative_error
from torch import distributed
from worlds import also_imports, worlds

for library in ("accelerate", "peft"):  # imported by the worlds' processes alone
    if find_spec(library) is None:
        pytest.skip(f"needs {library}", allow_module_level=True)
also_imports("accelerate", "peft")
world = worlds(2)


def accelerator_of(**options):
    """accelerate takes the FSDP path on devices only; on a CPU it has to be told."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        **options,
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def prepare(rank, options):
    reference = net()
    want = train_alone(reference, distributed.get_world_size())
    accelerator = accelerator_of(**options)
    assert accelerator.is_fsdp2
    model = net()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    checkpoints = "activation_checkpointing" in options
    assert type(model.blocks[0]).__name__ == ("FSDPCheckpointWrapper" if checkpoints else "FSDPBlock")
    assert all(type(p).__name__ == "DTensor" for p in model.parameters())
    assert_same_bits(model.head, net().head)
    losses = train_together(model, rank, distributed.get_world_size(), optimizer=optimizer)
    assert losses == pytest.approx(want, rel=1e-5)
    for p, alone in zip(model.parameters(), reference.parameters(), strict=True):
        if alone.requires_grad:
            assert relative_error(whole(p.detach()), alone) < 1e-4
    full = accelerator.get_state_dict(model)
    if rank == 0:
        assert full.keys() == reference.state_dict().keys()
        assert torch.equal(full["head.weight"], reference.head.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"cpu_ram_efficient_loading": False, "reshard_after_forward": True},
        {"cpu_ram_efficient_loading": True, "reshard_after_forward": False},
        {"cpu_ram_efficient_loading": False, "activation_checkpointing": True},
    ],
)
@fsdp_of_bytes
def test_accelerate_prepares_and_trains(world, options):
    world.run(prepare, options)


def leaves(rank):
    import peft
    from peft.tuners.lora import LoraLayer
    from torch.distributed.fsdp import fully_shard

    def made():
        base = net()
        for layer in layers(base):
            layer.lora_A = layer.lora_B = None
            layer.rank = 0
            for p in layer.parameters():
                p.requires_grad_(False)
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], init_lora_weights=False)
        return peft.get_peft_model(base, config)

    size = distributed.get_world_size()
    reference, model = made(), made()
    want = train_alone(reference, size)
    wrapped = 0
    for module in list(model.modules()):
        if isinstance(module, LoraLayer):
            for leaf in (module.lora_A.default, module.lora_B.default):
                fully_shard(leaf)
                wrapped += 1
    assert wrapped == 8
    fully_shard(model)
    losses = train_together(model, rank, size)
    assert losses == pytest.approx(want, rel=1e-5)
    for p, alone in zip(model.parameters(), reference.parameters(), strict=True):
        assert relative_error(whole(p.detach()).float(), alone.float()) < 1e-4


@fsdp_of_bytes
def test_peft_leaves_that_are_wrapped_one_by_one(world):
    """PEFT over QLinear without an adapter of its own: FSDP2 around every lora_A and lora_B, as accelerate's
    policy for PEFT has it, and around the rest."""
    world.run(leaves)
