"""The model that the distributed tests train, and how one process trains it."""

import contextlib

import torch
from torch import distributed, nn

import fastlora

ROWS = 6  # a rank's share of a batch
STEPS = 3


class Block(nn.Module):
    """Two layers, of sizes that ranks cannot share evenly, and a residual."""

    def __init__(self):
        super().__init__()
        self.up = fastlora.QLinear(70, 49, rank=4)
        self.down = fastlora.QLinear(49, 70, rank=3, dtype=torch.bfloat16, double_quant=False, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = fastlora.QLinear(70, 33, rank=4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def layers(model):
    return [m for m in model.modules() if isinstance(m, fastlora.QLinear)]


def net(seed=0):
    """The same in every process. Its adapters are not zero."""
    torch.manual_seed(seed)
    model = Net()
    for layer in layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def shard(model, *, by_layer=True, **options):
    """FSDP2, a group of parameters a block, or all in one."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks if by_layer else ():
        fully_shard(block, **options)
    return fully_shard(model, **options)


def batch(step, rank):
    return torch.randn(ROWS, 70, generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(model, x, rank=0):
    return model(x).float().square().mean()


def loss_in_bfloat16(model, x, rank=0):
    """As FSDP2's mixed precision computes it: float32 parameters and inputs, rounded for this call."""
    cast = {name: p.bfloat16() for name, p in model.named_parameters() if p.requires_grad}
    return torch.func.functional_call(model, cast, x.bfloat16()).float().square().mean()


def optimizer_of(model, lr=1e-2, **options):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **options)


def train_alone(model, size, micro=1, steps=STEPS, call=loss_of):
    """What a world of `size` ranks should do, in one process: the mean loss of every step. call(model, x,
    rank) is a rank's loss."""
    optimizer, losses = optimizer_of(model), []
    for step in range(steps):
        shares = [(micro * step + i, rank) for i in range(micro) for rank in range(size)]
        found = [call(model, batch(step, rank), rank) for step, rank in shares]
        for loss in found:
            loss.backward()
        for p in model.parameters():  # not the losses: a third of one is rounded in bfloat16
            if p.grad is not None:
                p.grad /= len(shares)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(loss.item() for loss in found) / len(found))
    return losses


@contextlib.contextmanager
def sync_always(model, last):
    yield


def train_together(
    model, rank, size, *, micro=1, steps=STEPS, call=loss_of, waits=sync_always, optimizer=None
):
    """The same by one rank. waits(model, last) is a context for each of a step's micro-batches, of which it
    is the last or not."""
    optimizer, losses = optimizer or optimizer_of(model), []
    for step in range(steps):
        total = torch.zeros(())
        for i in range(micro):
            with waits(model, i == micro - 1):
                loss = call(model, batch(micro * step + i, rank), rank) / micro
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        distributed.all_reduce(total)
        losses.append(total.item() / size)
    return losses


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def assert_same_bits(model, reference):
    """Every parameter, gathered, under its own name."""
    want = dict(reference.named_parameters())
    names = []
    for name, p in model.named_parameters():
        assert torch.equal(whole(p.detach()), want[name]), name
        names.append(name)
    assert names == list(want)
