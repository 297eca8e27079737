"""QA-LoRA: the pooled input, and the plain LoRA that it is."""

import pytest
import torch
from tolerances import TOLERANCES, relative_error
from torch import nn

import fastlora
from fastlora import QLinear
from fastlora.methods.qa_lora import QALoraQLinear
from fastlora.methods.reparametrised import make_plain

K, N, R, G = 96, 40, 4, 32


def trained(**options):
    torch.manual_seed(0)
    layer = QALoraQLinear(K, N, rank=R, alpha=8, **options)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [1, 16, G, K])
def test_the_equation_and_its_gradients(dtype, group_size):
    layer = trained(group_size=group_size)
    assert layer.lora_A.shape == (R, K // group_size)
    x = torch.randn(3, 5, K, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 5, N, dtype=dtype)
    w = layer.dequantize(torch.float32).double()
    a, b = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B))
    xd = x.detach().double().requires_grad_()
    pooled = xd.unflatten(-1, (-1, group_size)).mean(-1)
    want = xd @ w.T + 2 * pooled @ a.T @ b.T + layer.bias.detach().double()
    got = layer(x)
    tolerance = 2 * TOLERANCES[dtype].frobenius
    assert relative_error(got, want.detach()) < tolerance
    got.backward(dy)
    want.backward(dy.double())
    for mine, theirs in ((x, xd), (layer.lora_A, a), (layer.lora_B, b)):
        assert relative_error(mine.grad, theirs.grad) < tolerance


def test_pefts_numbers():
    """PEFT has QA-LoRA for GPTQ layers alone; its variant, asked for the change of a layer."""
    variants = pytest.importorskip("peft.tuners.lora.variants", reason="PEFT is not installed")
    if not hasattr(variants, "QALoraLinearVariant"):
        pytest.skip("this PEFT has no QA-LoRA")
    layer = trained()
    theirs = nn.Module()
    low, high = nn.Linear(K // G, R, bias=False), nn.Linear(R, N, bias=False)
    low.weight, high.weight = layer.lora_A, layer.lora_B
    theirs.lora_A, theirs.lora_B = nn.ModuleDict({"default": low}), nn.ModuleDict({"default": high})
    theirs.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
    theirs.scaling, theirs.qalora_group_size, theirs.in_features = (
        {"default": layer.scaling},
        {"default": G},
        K,
    )
    x = torch.randn(7, K)
    base = nn.functional.linear(x, layer.dequantize(), layer.bias)
    got = layer(x) - base
    change = variants.QALoraLinearVariant.forward(theirs, "default", x, torch.zeros_like(base))
    torch.testing.assert_close(got * (K // G), change, rtol=1e-3, atol=1e-4)  # PEFT's scaling has k/g in it


def test_it_starts_at_its_base():
    layer = QALoraQLinear(K, N, rank=R)
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias))
    assert layer.lora_A.abs().max() <= (G / K) ** 0.5
    with torch.device("meta"):
        assert QALoraQLinear(K, N, rank=R).lora_A.shape == (R, K // G)


def test_training_and_state():
    layer = trained(dropout=0.1)
    x = torch.randn(64, K)
    pooled = x.unflatten(-1, (-1, G)).mean(-1)
    target = nn.functional.linear(x, layer.dequantize(), layer.bias) + 3 * pooled @ torch.randn(K // G, N)
    optimizer = torch.optim.AdamW(layer.adapter_parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    other = QALoraQLinear(K, N, rank=R, alpha=8).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer.eval()(x))


def test_the_plain_lora_that_it_is(tmp_path):
    layer = trained()
    x = torch.randn(3, K)
    plain = layer.plain()
    assert type(plain) is QLinear
    assert torch.equal(plain.lora_A, layer.lora_A.repeat_interleave(G, 1) / G)
    assert plain.scaling == layer.scaling
    assert torch.equal(plain(x), layer(x))
    assert torch.equal(plain.merged_weight(), layer.merged_weight())
    assert "group_size=32" in repr(layer)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(K, N)

    net, other = Net(), Net()
    net.up = layer
    fastlora.save_adapter(net, tmp_path)
    other.up = QLinear(K, N, rank=R)
    other.up.share_base(layer)
    other.up.bias = layer.bias
    fastlora.load_adapter(other, tmp_path)
    assert torch.equal(other.up(x), layer(x))
    assert make_plain(net) == 1
    assert type(net.up) is QLinear
    with pytest.raises(ValueError, match="make_plain: expected a module that holds layers, got a layer"):
        make_plain(layer)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def converted(kind=QALoraQLinear, group_size=8, seed=0):
    net = Two()
    options = {"group_size": group_size} if kind is QALoraQLinear else {}
    fastlora.convert(net, rank=R, alpha=8, layer_class=kind, progress=False, **options)
    torch.manual_seed(seed)
    for layer in (net.up, net.down):
        nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B, std=0.1)
    return net


@pytest.mark.parametrize("group_size", [8, 4, 1])
def test_a_file_is_read_back(tmp_path, group_size):
    ours = converted(group_size=group_size)
    ours.up.set_alpha(6, use_rslora=False)
    fastlora.save_adapter(ours, tmp_path)
    other = converted(group_size=group_size, seed=1)
    fastlora.load_adapter(other, tmp_path)
    for mine, theirs in ((ours.up, other.up), (ours.down, other.down)):
        assert torch.equal(theirs.lora_A, mine.lora_A)
        assert torch.equal(theirs.lora_B, mine.lora_B)
        assert theirs.scaling == mine.scaling
    x = torch.randn(3, K)
    assert torch.equal(other(x), ours(x))
    finer = converted(group_size=max(group_size // 2, 1))  # is constant over its groups too
    fastlora.load_adapter(finer, tmp_path)
    torch.testing.assert_close(finer(x), ours(x))


def test_a_file_that_is_not_constant_over_groups_is_refused(tmp_path):
    plain = converted(QLinear)
    fastlora.save_adapter(plain, tmp_path / "plain")
    net = converted(seed=1)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    message = "load_adapter: up: expected a lora_A that is constant over each group of 8 inputs, got another"
    with pytest.raises(ValueError, match=message):
        fastlora.load_adapter(net, tmp_path / "plain")
    plain.up.lora_A.data.zero_()  # is constant, and the second layer's is not
    fastlora.save_adapter(plain, tmp_path / "half")
    with pytest.raises(ValueError, match="load_adapter: down: expected a lora_A that is constant"):
        fastlora.load_adapter(net, tmp_path / "half")
    with pytest.raises(RuntimeError, match="expected plain LoRA layers, got 2 that are not: up"):
        fastlora.load_adapter(net, tmp_path / "half", name="other")
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_training_goes_on_where_it_stopped(tmp_path):
    x, target = torch.randn(32, K), torch.randn(32, K)

    def adamw(net):
        return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)

    def train(net, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), target).backward()
            optimizer.step()

    whole = converted()
    optimizer = adamw(whole)
    train(whole, optimizer)
    torch.save([whole.state_dict(), optimizer.state_dict()], tmp_path / "state")
    train(whole, optimizer)
    again = converted(seed=1)
    model, moments = torch.load(tmp_path / "state", weights_only=True)
    again.load_state_dict(model)
    optimizer = adamw(again)
    optimizer.load_state_dict(moments)
    train(again, optimizer)
    for name, t in whole.state_dict().items():
        assert torch.equal(t, again.state_dict()[name]), name


def test_convert():
    net = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    fastlora.convert(net, rank=R, layer_class=QALoraQLinear, group_size=16, init="gaussian", progress=False)
    assert [layer.lora_A.shape[1] for layer in net] == [4, 6]
    assert all(layer.lora_A.requires_grad for layer in net)


def test_what_is_refused():
    for size in (0, 7, 2.0):
        with pytest.raises(ValueError, match=r"expected a group_size that divides in_features 96, got "):
            QALoraQLinear(K, N, group_size=size)
    with pytest.raises(
        ValueError, match=r"set_adapter_values: expected lora_a of shape \(4, 3\), got \(4, 96\)"
    ):
        QALoraQLinear.from_linear(nn.Linear(K, N), rank=R, init="loftq")
    with pytest.raises(TypeError, match="unexpected keyword argument 'group_size'"):
        QLinear.from_linear(nn.Linear(K, N), group_size=32)
