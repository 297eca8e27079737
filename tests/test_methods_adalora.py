"""AdaLoRA: the layer, the budget, and what is left."""

import pytest
import torch
from tolerances import relative_error
from torch import nn

import fastlora
from fastlora import QLinear
from fastlora.methods.adalora import AdaLora, AdaLoraQLinear

R = 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 24, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def converted(**options):
    net = Net()
    fastlora.convert(net, rank=R, alpha=12, layer_class=AdaLoraQLinear, progress=False, **options)
    torch.manual_seed(1)
    for layer in (net.up, net.down):
        nn.init.normal_(layer.lora_E, std=0.3)
        nn.init.normal_(layer.lora_A, std=0.2)
        nn.init.normal_(layer.lora_B, std=0.2)
    return net


def batch():
    torch.manual_seed(2)
    return torch.randn(48, 32), torch.randn(48, 24)


def train(net, adalora, steps, optimizer=None, first=0):
    """Losses; the state that a step of the paper goes through."""
    x, target = batch()
    optimizer = optimizer or torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(first, steps):
        loss = nn.functional.mse_loss(net(x), target)
        (loss + adalora.orthogonality_loss()).backward()
        optimizer.step()
        adalora.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def left(net):
    return sum(int((layer.lora_E != 0).sum()) for layer in (net.up, net.down))


def test_the_equation_and_its_gradients():
    layer = converted().up
    x = torch.randn(5, 32, requires_grad=True)
    dy = torch.randn(5, 64)
    w = layer.dequantize(torch.float32).double()
    q, p, e = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B, layer.lora_E))
    want = x.detach().double() @ (w + 12 / R * p @ torch.diag(e[:, 0]) @ q).T + layer.bias.double()
    got = layer(x)
    assert relative_error(got, want.detach()) < 1e-6
    got.backward(dy)
    want.backward(dy.double())
    for mine, theirs in ((layer.lora_A, q), (layer.lora_B, p), (layer.lora_E, e)):
        assert relative_error(mine.grad, theirs.grad) < 1e-5
    want = w + 12 / R * p.detach() @ torch.diag(e.detach()[:, 0]) @ q.detach()
    assert relative_error(layer.merged_weight(), want) < 1e-6


def test_it_starts_at_its_base():
    layer = AdaLoraQLinear(32, 64, rank=R)
    assert not layer.lora_E.any()
    assert layer.lora_A.std().item() == pytest.approx(0.02, rel=0.3)
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias))


def test_the_budget():
    adalora = AdaLora(converted(), total_steps=100, target_rank=2, init_steps=10, final_steps=20)
    assert [adalora.budget(step) for step in (0, 10, 45, 80, 81, 99)] == [12, 12, 5, 4, 4, 4]
    steps = [adalora.budget(step) for step in range(100)]
    assert steps == sorted(steps, reverse=True)


def test_the_regulariser():
    net = converted()
    adalora = AdaLora(net, total_steps=10, target_rank=2)
    eye = torch.eye(R).double()
    off = []
    for layer in (net.up, net.down):
        a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        off += [(a @ a.T - eye).norm(), (b.T @ b - eye).norm()]
    assert adalora.orthogonality_loss().item() == pytest.approx(0.5 * sum(off).item() / 4, rel=1e-5)


def test_the_budget_is_reached_on_schedule_and_layers_shrink(tmp_path):
    net = converted()
    adalora = AdaLora(net, total_steps=30, target_rank=2, init_steps=3, final_steps=8)
    x, target = batch()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(30):
        losses += train(net, adalora, step + 1, optimizer, step)
        assert left(net) == adalora.budget(step)
        if step >= 22:
            assert sum(adalora.ranks().values()) == 4
    assert losses[-1] < losses[0]
    want, ranks = net(x), adalora.ranks()
    fastlora.save_adapter(net, tmp_path / "whole")  # as plain LoRA of the first ranks
    adalora.compact()
    assert type(net.up) is type(net.down) is QLinear
    assert {name: net.get_submodule(name).rank for name in ranks} == ranks
    torch.testing.assert_close(net(x), want)
    assert net.up.lora_A.requires_grad is True or net.up.rank == 0
    fastlora.save_adapter(net, tmp_path / "compact")
    other = Net()
    fastlora.convert(other, rank=R, progress=False)
    fastlora.load_adapter(other, tmp_path / "whole")
    torch.testing.assert_close(other(x), want)
    assert nn.functional.mse_loss(want, target).item() < losses[0]


def test_a_layer_may_lose_everything():
    layer = AdaLoraQLinear(32, 64, rank=R)
    plain = layer.plain()
    assert plain.rank == 0
    assert plain.lora_A is None
    assert plain.weight is layer.weight
    assert plain.bias is layer.bias
    x = torch.randn(3, 32)
    torch.testing.assert_close(plain(x), layer(x))


@pytest.mark.parametrize("every", [1, 3])
def test_pefts_numbers(every):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    net = converted()
    dense = Net()
    for name in ("up", "down"):
        dense.get_submodule(name).weight.data = net.get_submodule(name).dequantize()
    config = peft.AdaLoraConfig(
        init_r=R, target_r=2, lora_alpha=12, tinit=2, tfinal=4, total_step=20, deltaT=every,
        target_modules=["up", "down"],
    )  # fmt: skip
    model = peft.get_peft_model(dense, config)
    layers = {name: model.base_model.model.get_submodule(name) for name in ("up", "down")}
    for name, theirs in layers.items():
        for part in ("lora_A", "lora_B", "lora_E"):
            getattr(theirs, part)["default"].data.copy_(getattr(net.get_submodule(name), part))
    adalora = AdaLora(net, total_steps=20, target_rank=2, init_steps=2, final_steps=4, every=every)
    mine = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05)
    other = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    x, target = batch()
    for step in range(20):
        train(net, adalora, step + 1, mine, step)
        loss = nn.functional.mse_loss(model(x), target)
        pairs = [t for one in layers.values() for t in (one.lora_A["default"], one.lora_B["default"].T)]
        loss = loss + 0.5 * sum((t @ t.T - torch.eye(R)).norm() for t in pairs) / len(pairs)
        loss.backward()
        other.step()
        model.base_model.update_and_allocate(step)
        other.zero_grad()
        for name, theirs in layers.items():
            layer = net.get_submodule(name)
            e = theirs.lora_E["default"]
            assert torch.equal(layer.lora_E == 0, e == 0), (step, name)
            torch.testing.assert_close(layer.lora_E, e, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(layer.lora_A, theirs.lora_A["default"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(net(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stop", [2, 10, 18])  # before the budget falls, while it does, and after
def test_a_training_goes_on_where_it_stopped(stop, tmp_path):
    """To the same bits, through a file."""
    runs = []
    for stops in (False, True):
        net = converted()
        options = {"total_steps": 20, "target_rank": 2, "init_steps": 4, "final_steps": 4}
        adalora = AdaLora(net, **options)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
        train(net, adalora, stop, optimizer)
        if stops:
            parts = {"model": net, "adalora": adalora, "optimizer": optimizer}
            torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "state")
            state = torch.load(tmp_path / "state", weights_only=True)
            net = converted()
            net.load_state_dict(state["model"])
            adalora = AdaLora(net, **options)
            adalora.load_state_dict(state["adalora"])
            optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
            optimizer.load_state_dict(state["optimizer"])
        losses = train(net, adalora, 20, optimizer, first=stop)
        runs.append((losses, adalora.ranks(), net.state_dict()))
    assert runs[0][:2] == runs[1][:2]
    assert sum(runs[0][1].values()) == 4
    for name, t in runs[0][2].items():
        assert torch.equal(t, runs[1][2][name]), name


def test_what_is_refused(tmp_path):
    net = converted()
    for options, message in (
        ({"target_rank": 7}, "expected target_rank from 1 to the layers' mean rank 6, got 7"),
        ({"target_rank": 0}, "expected target_rank from 1"),
        ({"init_steps": 10}, "expected 0 <= init_steps < total_steps - final_steps, got init_steps 10"),
        ({"every": 0}, "expected every >= 1, got 0"),
        ({"beta1": 1.0}, r"expected beta1 and beta2 in \(0, 1\), got 1.0 and 0.85"),
        ({"orthogonality": -1}, "expected orthogonality >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaLora(net, **{"total_steps": 10, "target_rank": 2} | options)
    with pytest.raises(
        ValueError, match="expected a model with AdaLoraQLinear layers of rank >= 1, got none"
    ):
        AdaLora(Net(), total_steps=10)
    adalora = AdaLora(net, total_steps=10, target_rank=2)
    with pytest.raises(RuntimeError, match=r"expected gradients, .* got 6 parameters without: up.lora_A"):
        adalora.update_and_allocate(0)
    with pytest.raises(RuntimeError, match="expected a call for an earlier step, got none"):
        adalora.update_and_allocate(10)
    with pytest.raises(ValueError, match="expected importance of this model's layers, got others"):
        adalora.load_state_dict({"importance": {"x": torch.ones(1)}, "uncertainty": {}, "kept": {}})
    for init in ("gaussian", "pissa"):
        with pytest.raises(ValueError, match="AdaLoraQLinear: expected init 'default', got"):
            AdaLoraQLinear.from_linear(nn.Linear(8, 8), rank=2, init=init)
    fastlora.save_adapter(net, tmp_path)
    with pytest.raises(RuntimeError, match="expected plain LoRA layers, got 2 that are not"):
        fastlora.load_adapter(net, tmp_path)
    with pytest.raises(
        RuntimeError, match="add_adapter: expected a layer with plain LoRA, got AdaLoraQLinear"
    ):
        net.up.add_adapter("x", 2, 4)
    net.up.merge()
    with pytest.raises(RuntimeError, match="plain: expected an unmerged layer, got a merged one"):
        adalora.compact()
    assert type(net.down) is AdaLoraQLinear
