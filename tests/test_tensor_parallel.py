"""ColwiseQLinear and RowwiseQLinear: ranks that share a layer compute what one process does, and learn it."""

import copy

import pytest
import torch
from distributed_cases import assert_same_bits, layers, optimizer_of, whole
from needs import fsdp_of_bytes
from tolerances import relative_error
from torch import distributed, nn
from worlds import worlds

import fastlora

parallel = pytest.importorskip(
    "torch.distributed.tensor.parallel", reason="this torch was built without torch.distributed"
)
world = worlds(2, 3)
ROWS, TOKENS = 2, 6  # TOKENS: what 2 and 3 ranks share


class Block(nn.Module):
    """A gated block as transformers have them. k is what 2 and 3 ranks share, n is not."""

    def __init__(self, k=384, hidden=768, **options):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(k)
        self.gate = fastlora.QLinear(k, hidden, rank=3, **options)
        self.up = nn.Linear(k, hidden)
        self.down = fastlora.QLinear(hidden, k - 5, rank=4, **options)
        self.head = fastlora.QLinear(k - 5, 49, rank=2, bias=False, blocksize=32)
        for layer in layers(self):
            nn.init.normal_(layer.lora_B, std=0.1)

    def forward(self, x):
        x = self.norm(x)
        return self.head(self.down(self.gate(x) * self.up(x).sigmoid()))


def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (distributed.get_world_size(),))


def split(block):
    from fastlora.integrations.tensor_parallel import ColwiseQLinear, RowwiseQLinear

    plan = {
        "gate": ColwiseQLinear(),
        "up": parallel.ColwiseParallel(),  # torch's own, beside ours
        "down": RowwiseQLinear(),
    }
    return parallel.parallelize_module(block, mesh(), plan)


def inputs(seed=0, k=384):
    return torch.randn(ROWS, TOKENS, k, generator=torch.Generator().manual_seed(seed))


def gradients_match(got, reference, tolerance=1e-5):
    for (name, p), want in zip(got.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (want.grad is None), name
        if want.grad is not None:
            assert relative_error(whole(p.grad), want.grad) < tolerance, name


# --- a block ----------------------------------------------------------------------------------------------


def learns(rank, options):
    reference, block = Block(**options), split(Block(**options))
    assert_same_bits(block, reference)
    size = distributed.get_world_size()
    assert block.gate.weight.to_local().shape == (768 // size, 192)
    assert block.down.weight.to_local().shape == (379, 384 // size)
    optimizers = optimizer_of(reference, lr=1e-3), optimizer_of(block, lr=1e-3)
    for step in range(3):
        losses = []
        for model in (reference, block):
            x = inputs(step).requires_grad_()
            loss = model(x).square().mean()
            loss.backward()
            losses.append((loss.item(), x.grad))
        assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
        assert relative_error(losses[1][1], losses[0][1]) < 1e-4
        gradients_match(block, reference, 1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for model in (reference, block):
        model.eval()
    with torch.no_grad():
        assert relative_error(block(inputs(9)), reference(inputs(9))) < 1e-4


@pytest.mark.parametrize(
    "options",
    [{}, {"double_quant": False}, {"blocksize": 128, "bias": False}, {"blocksize": 32, "use_rslora": True}],
)
def test_a_split_block_learns_what_a_whole_one_learns(world, options):
    """Column-wise into row-wise, beside torch's own style; outputs, all gradients, three steps of AdamW."""
    world.run(learns, options)


# --- one layer, of many sizes -----------------------------------------------------------------------------


def one_layer(rank, style, n, k, options, groups=0):
    from torch.distributed.tensor import Replicate

    from fastlora.integrations import tensor_parallel as ours

    torch.manual_seed(0)
    options = {"rank": 5, **options}
    reference = fastlora.QLinear(k, n, **options)
    if reference.lora_B is not None:
        nn.init.normal_(reference.lora_B, std=0.1)
    if groups:
        values = 0.1 * torch.randn(n, groups)
        reference._set_base(reference.quantized_weight.with_offsets(values))
    layer = copy.deepcopy(reference)
    plan = getattr(ours, style)(input_layouts=Replicate(), output_layouts=Replicate())
    parallel.parallelize_module(layer, mesh(), plan)
    assert_same_bits(layer, reference)
    assert layer.quantized_weight == reference.quantized_weight
    # The weight that this rank multiplies by, bit for bit.
    scales, nested = layer.local_scales()
    assert (nested is not None) == (style == "ColwiseQLinear" and (n, k) == (768, 1024))  # else decoded
    packed = layer.weight.to_local()
    rows, columns = (packed.shape[0], k) if style == "ColwiseQLinear" else (n, 2 * packed.shape[1])
    offsets = layer.weight_offsets.to_local() if groups else None
    part = fastlora.NF4Weight(
        packed, scales, nested, (rows, columns), torch.float32, layer.blocksize, offsets
    )
    size = distributed.get_world_size()
    dense = reference.dequantize(torch.float32)
    assert torch.equal(part.dequantize(), dense.chunk(size, 0 if columns == k else 1)[rank])
    for x in (inputs(k=k), inputs(k=k)[0, 0], inputs(k=k)[:0]):
        got, want = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = layer(got), reference(want)
        assert y.shape == expected.shape
        dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
        y.backward(dy)
        expected.backward(dy)
        if x.numel():
            assert relative_error(y, expected) < 1e-5
            assert relative_error(got.grad, want.grad) < 1e-5
            gradients_match(layer, reference)
        layer.zero_grad()
        reference.zero_grad()


@pytest.mark.parametrize(
    ("style", "n", "k", "options"),
    [
        ("ColwiseQLinear", 49, 64, {}),  # rows that do not divide
        ("ColwiseQLinear", 97, 320, {"bias": False, "double_quant": False}),
        ("ColwiseQLinear", 768, 1024, {}),  # groups of nested scales end where rows of ranks do
        ("ColwiseQLinear", 12, 96, {"blocksize": 32}),
        ("ColwiseQLinear", 12, 96, {"double_quant": False}),  # blocks straddle rows, but not those of ranks
        ("ColwiseQLinear", 4, 33, {"blocksize": 32, "rank": 0}),
        ("ColwiseQLinear", 12, 32, {"blocksize": 32, "rank": 0, "dtype": torch.bfloat16}),
        ("RowwiseQLinear", 49, 384, {}),
        ("RowwiseQLinear", 5, 768, {"blocksize": 128, "bias": False}),
        ("RowwiseQLinear", 300, 192, {"blocksize": 32, "double_quant": False}),
        ("RowwiseQLinear", 3, 192, {"blocksize": 32, "rank": 0}),
    ],
)
def test_parts_are_exact(world, style, n, k, options):
    """The weight of a rank is its part of the whole one, bit for bit; results and gradients are the sum."""
    if (n, k) == (4, 33):
        n = 64 * world.size  # an odd k: whole blocks of rows only
    world.run(one_layer, style, n, k, options)


@pytest.mark.parametrize(
    ("style", "n", "k", "groups"),
    [("ColwiseQLinear", 49, 64, 1), ("ColwiseQLinear", 50, 384, 6), ("RowwiseQLinear", 49, 384, 12)],
)
def test_parts_of_a_weight_with_offsets_are_exact(world, style, n, k, groups):
    world.run(one_layer, style, n, k, {}, groups)


def layouts(rank):
    """Sequence parallelism: tokens are dealt to ranks outside, features inside."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from fastlora.integrations.tensor_parallel import ColwiseQLinear, RowwiseQLinear

    size = distributed.get_world_size()
    reference, block = Block(), Block()
    plan = {
        "norm": parallel.SequenceParallel(use_local_output=True),
        "gate": ColwiseQLinear(input_layouts=Shard(1), use_local_output=False),
        "up": parallel.ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "down": RowwiseQLinear(output_layouts=Replicate()),
    }
    parallel.parallelize_module(block, mesh(), plan)
    x = inputs()
    mine = x.chunk(size, 1)[rank]
    loss, want = block(mine).square().mean(), reference(x).square().mean()
    loss.backward()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for name in ("gate", "down", "head"):
        gradients_match(getattr(block, name), getattr(reference, name))
    down = parallel.parallelize_module(
        copy.deepcopy(reference.down), mesh(), RowwiseQLinear(output_layouts=Shard(1), use_local_output=False)
    )
    x = torch.randn(2, TOKENS, 768, generator=torch.Generator().manual_seed(2))
    y = down(DTensor.from_local(x, mesh(), [Replicate()], run_check=False))
    assert y.placements == (Shard(1),)
    assert relative_error(y.full_tensor(), reference.down(x)) < 1e-5
    assert repr(down.style).startswith("RowwiseQLinear(input_layouts=")


def test_layouts_of_sequence_parallelism(world):
    world.run(layouts)


# --- adapters ---------------------------------------------------------------------------------------------


def block_of_many():
    block = Block()
    torch.manual_seed(1)
    for layer in layers(block):
        for name, r in (("a", 3), ("b", 6)):
            nn.init.normal_(layer.add_adapter(name, r, 4).lora_B, std=0.1)
    return block


def many(rank, directory):
    reference, block = block_of_many(), split(block_of_many())
    for names in (["a", None], ["default", "b"], ["b", "b"]):
        results = []
        for model in (reference, block):
            model.zero_grad()
            with fastlora.adapters(model, names):
                y = model(inputs())
            y.square().mean().backward()
            results.append(y)
        assert relative_error(results[1], results[0]) < 1e-5
        gradients_match(block, reference, 1e-4)
    for layer in (*layers(reference), *layers(block)):
        layer.set_adapter("b")
    assert relative_error(block(inputs()), reference(inputs())) < 1e-5
    for name in ("default", "a"):
        path = f"{directory}-{name}-{rank}"
        fastlora.save_adapter(block, path, name=name)
        again, other = block_of_many(), split(block_of_many())
        for model in (again, other):
            for layer in layers(model):
                nn.init.zeros_(layer.adapter(name).lora_B)
            fastlora.load_adapter(model, path, name=name)
            assert_same_bits(model, reference)
    with pytest.raises(RuntimeError, match="add_adapter: expected a layer whose parameters are whole"):
        block.gate.add_adapter("c", 2, 4)
    with pytest.raises(RuntimeError, match="merge: expected a layer whose parameters are whole"):
        block.gate.merge()


def test_named_adapters_are_routed_trained_and_saved(world, tmp_path):
    world.run(many, str(tmp_path / "adapter"))


def dropout(rank):
    """Ranks that are seeded alike drop what one process drops, column-wise."""
    from torch.distributed.tensor import Replicate

    from fastlora.integrations.tensor_parallel import ColwiseQLinear

    reference = fastlora.QLinear(64, 48, rank=4, dropout=0.5)
    torch.manual_seed(0)
    reference.reset_parameters()
    nn.init.normal_(reference.lora_B)
    layer = copy.deepcopy(reference)
    parallel.parallelize_module(layer, mesh(), ColwiseQLinear(output_layouts=Replicate()))
    x = inputs(k=64)
    for model in (reference, layer):
        torch.manual_seed(5)
        y = model(x)
        y.square().sum().backward()
        if model is reference:
            want = y
    assert relative_error(y, want) < 1e-5
    gradients_match(layer, reference)


def test_dropout(world):
    world.run(dropout)


# --- states -----------------------------------------------------------------------------------------------


def states(rank):
    """What is loaded is computed with, although a rank keeps decoded scales; on meta first, too."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    reference, block = Block(), split(Block())
    block(inputs())
    for layer in layers(reference):
        layer.reset_parameters()
    distributed.broadcast_object_list(held := [reference.state_dict()])
    reference.load_state_dict(held[0])
    everything = StateDictOptions(full_state_dict=True)
    set_model_state_dict(block, reference.state_dict(), options=everything)
    assert relative_error(block(inputs()), reference(inputs())) < 1e-5
    full = get_model_state_dict(block, options=everything)
    assert all(torch.equal(full[key], want) for key, want in reference.state_dict().items())
    with torch.device("meta"):
        empty = Block()
    empty = split(empty).to_empty(device="cpu")
    set_model_state_dict(empty, reference.state_dict(), options=everything)
    assert_same_bits(empty, reference)
    assert relative_error(empty(inputs()), reference(inputs())) < 1e-5
    with torch.no_grad():  # in place, past every hook
        for p in (block.gate.weight_scales, block.down.weight_scales):
            p.copy_(torch.zeros_like(p))
    for layer in (reference.gate, reference.down):
        layer.weight_scales.data.zero_()
    assert relative_error(block(inputs()), reference(inputs())) < 1e-5
    block.bfloat16().float()
    assert torch.isfinite(block(inputs())).all()


def test_states_of_split_layers_are_those_of_whole_ones(world):
    world.run(states)


def sharded_too(rank):
    """FSDP2 around tensor parallelism: a mesh of both."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from fastlora.integrations.tensor_parallel import ColwiseQLinear, RowwiseQLinear

    size = distributed.get_world_size()
    for shape in ((size, 1), (1, size)):
        both = init_device_mesh("cpu", shape, mesh_dim_names=("data", "model"))
        reference, block = Block(), Block()
        plan = {"gate": ColwiseQLinear(), "up": parallel.ColwiseParallel(), "down": RowwiseQLinear()}
        parallel.parallelize_module(block, both["model"], plan)
        fully_shard(block, mesh=both["data"])
        ranks = range(shape[0])
        for step in range(2):
            total = sum(reference(inputs(r + step)).square().mean() for r in ranks) / shape[0]
            total.backward()
            block(inputs(both["data"].get_local_rank() + step)).square().mean().backward()
            gradients_match(block, reference, 1e-4)
        assert_same_bits(block, reference)


@fsdp_of_bytes
def test_fsdp_around_tensor_parallelism(world):
    world.run(sharded_too)


# --- errors -----------------------------------------------------------------------------------------------


def refusals(rank):
    from torch.distributed.device_mesh import init_device_mesh

    from fastlora.integrations.tensor_parallel import ColwiseQLinear, RowwiseQLinear

    size = distributed.get_world_size()

    def refused(layer, style, error, match):
        before = dict(layer.named_parameters())
        with pytest.raises(error, match=match):
            parallel.parallelize_module(layer, mesh(), style)
        assert all(p is before[name] for name, p in layer.named_parameters())
        assert type(layer) in {fastlora.QLinear, nn.Linear}

    whole_blocks = f"RowwiseQLinear: expected in_features that give each of {size} ranks whole blocks of 64"
    for k in (96 * size + 1, 96 * size):
        refused(fastlora.QLinear(k, 4), RowwiseQLinear(), ValueError, f"{whole_blocks} weights, got {k}")
    straddling = "the 2 rows of a rank to be whole blocks of 64 weights, got in_features=70"
    refused(
        fastlora.QLinear(70, 2 * size), ColwiseQLinear(), ValueError, f"ColwiseQLinear: expected {straddling}"
    )
    none = f"expected out_features of which each of {size} ranks gets rows, got {size - 1} \\(1 to a rank\\)"
    refused(fastlora.QLinear(64, size - 1), ColwiseQLinear(), ValueError, none)
    refused(nn.Linear(4, 4), ColwiseQLinear(), TypeError, "expected a fastlora.QLinear, got Linear")
    merged = fastlora.QLinear(128, 128).eval()
    merged.merge()
    refused(merged, RowwiseQLinear(), RuntimeError, "expected a whole, unmerged layer, got a merged one")
    coarse = fastlora.QLinear(64 * size, 4)
    coarse._set_base(coarse.quantized_weight.with_offsets(torch.ones(4, 1)))
    few = f"RowwiseQLinear: expected offsets of groups of columns that {size} ranks can share, got 1 a row"
    refused(coarse, RowwiseQLinear(), ValueError, few)
    layer = parallel.parallelize_module(fastlora.QLinear(128, 12), mesh(), ColwiseQLinear())
    with pytest.raises(RuntimeError, match="expected a whole, unmerged layer, got a sharded one"):
        ColwiseQLinear()._apply(layer, mesh())
    with pytest.raises(
        ValueError, match="ColwiseQLinear: expected x of 128 features over all ranks, got 127"
    ):
        layer(torch.randn(2, 127))
    both = init_device_mesh("cpu", (size, 1))
    with pytest.raises(ValueError, match="expected a mesh of one dimension, got 2"):
        ColwiseQLinear()._apply(fastlora.QLinear(128, 12), both)


def test_refusals(world):
    world.run(refusals)
