"""scale_adapter: an adapter that counts more or less, by name, in a whole model."""

import pytest
import torch
from torch import nn

import fastlora
from fastlora import QExperts, QLinear
from fastlora.methods.adalora import AdaLoraQLinear
from fastlora.methods.dora import DoraQLinear
from fastlora.methods.qa_lora import QALoraQLinear

K, N = 64, 96


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def converted(**options):
    """With an adapter of each layer's own, "one" on both, with rsLoRA, and "two" on the first."""
    net = Net()
    fastlora.convert(net, rank=3, alpha=5, progress=False, **options)
    if not options:
        net.up.add_adapter("one", 5, 7, use_rslora=True)
        net.down.add_adapter("one", 3, 7, use_rslora=True)
        net.up.add_adapter("two", 4, 6)
    for name, p in net.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.1)
    return net.eval()


def used(net, name):
    for layer in (net.up, net.down):
        layer.set_adapter(name if name in layer.adapter_names else None)
    return net


def batch():
    return torch.randn(4, K, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["default", "one", "two"])
def test_the_change_is_factor_times_what_it_was(name):
    net = used(converted(), name)
    others = {
        (layer, one): layer.adapter(one).scaling
        for layer in (net.up, net.down)
        for one in layer.adapter_names
        if one != name
    }
    base, x, before = net.up.dequantize(), batch(), net(batch())
    change, scaling = net.up.merged_weight() - base, net.up.adapter(name).scaling
    for factor in (0.3, -1.0, 2.5):
        fastlora.scale_adapter(net, name, factor)
        assert net.up.adapter(name).scaling == scaling * factor
        torch.testing.assert_close(net.up.merged_weight() - base, factor * change, rtol=1e-4, atol=1e-6)
        want = nn.functional.linear(x, base + factor * change, net.up.bias)
        torch.testing.assert_close(net.up(x), want, rtol=1e-4, atol=1e-4)
    fastlora.scale_adapter(net, name, 0)
    used_none = used(converted(), None)
    torch.testing.assert_close(net(x), used_none(x))
    fastlora.scale_adapter(net, name, 1.0)
    assert torch.equal(net(x), before)
    assert net.up.adapter(name).scaling == scaling
    assert others == {(layer, one): layer.adapter(one).scaling for layer, one in others}


def test_a_batch_of_several_adapters():
    net, x = converted(), batch()
    names = ["one", None, "default", "two"]
    with fastlora.adapters(net, names):
        before = net(x)
    fastlora.scale_adapter(net, "one", 0.5)
    with fastlora.adapters(net, names):
        after = net(x)
    assert torch.equal(after[1:], before[1:])
    torch.testing.assert_close(after[:1], used(net, "one")(x[:1]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[0], before[0], atol=1e-3)
    fastlora.scale_adapter(net, "one", 1)
    with fastlora.adapters(net, names):
        assert torch.equal(net(x), before)


def test_gradients_are_scaled_too():
    grads = []
    for factor in (1, 2):
        net = converted()
        fastlora.scale_adapter(net, "default", factor)
        net.down(batch() @ torch.ones(K, N)).sum().backward()
        grads.append(net.down.lora_B.grad)
    torch.testing.assert_close(grads[1], 2 * grads[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [DoraQLinear, AdaLoraQLinear, QALoraQLinear])
def test_other_methods(kind):
    net, x = converted(layer_class=kind), batch()
    if kind is AdaLoraQLinear:
        nn.init.normal_(net.up.lora_E), nn.init.normal_(net.down.lora_E)
    before = net(x)
    fastlora.scale_adapter(net, "default", 0)
    assert not torch.equal(net(x), before)
    fastlora.scale_adapter(net, "default", 1)
    assert torch.equal(net(x), before)


def test_experts():
    torch.manual_seed(0)
    experts = QExperts(2, 32, 64, rank=2, alpha=6)
    fastlora.scale_adapter(nn.Sequential(experts), "default", 0.7)
    assert experts.scaling == 3 * 0.7
    fastlora.scale_adapter(experts, "default", 1)
    assert experts.scaling == 3


def test_files_hold_what_is_in_force(tmp_path):
    net, x = used(converted(), "one"), batch()
    fastlora.scale_adapter(net, "one", 0.3)
    fastlora.save_adapter(net, tmp_path, name="one")
    other = converted()
    fastlora.load_adapter(other, tmp_path, name="one")
    torch.testing.assert_close(used(other, "one")(x), net(x))
    before = other(x)
    fastlora.scale_adapter(other, "one", 2)
    fastlora.load_adapter(other, tmp_path, name="one")  # and the factor is 1 again
    assert torch.equal(other(x), before)


@pytest.mark.parametrize("over", ["QLinear", "dense"])
def test_pefts_layers(over):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    net = Net()
    if over == "QLinear":
        fastlora.convert(net, rank=0, progress=False)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], "init_lora_weights": False}
    model = peft.get_peft_model(net, peft.LoraConfig(**options)).eval()
    model.add_adapter("other", peft.LoraConfig(**options, use_rslora=True))
    x, before = batch(), model(batch())
    layers = [model.base_model.model.up, model.base_model.model.down]
    fastlora.scale_adapter(model, "default", 0.3)
    assert [layer.scaling["default"] for layer in layers] == [0.3 * 6 / 4] * 2
    assert [layer.scaling["other"] for layer in layers] == [6 / 2] * 2
    scaled = model(x)
    assert not torch.allclose(scaled, before, atol=1e-3)
    fastlora.scale_adapter(model, "default", 1)
    assert torch.equal(model(x), before)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="expected unmerged layers, got 2 that are merged"):
        fastlora.scale_adapter(model, "default", 2)
    with pytest.raises(ValueError, match=r"got 'x'; this model has \['default', 'other'\]"):
        fastlora.scale_adapter(model, "x", 2)


def test_what_is_refused():
    net = converted()
    for factor in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale_adapter: expected a finite factor, got "):
            fastlora.scale_adapter(net, "one", factor)
    with pytest.raises(ValueError, match=r"got 'three'; this model has \['default', 'one', 'two'\]"):
        fastlora.scale_adapter(net, "three", 2)
    with (
        fastlora.adapters(net, ["one"]),
        pytest.raises(RuntimeError, match=r"scale_adapter: expected to be called outside adapters\(\)"),
    ):
        fastlora.scale_adapter(net, "one", 2)
    net.down.merge()
    with pytest.raises(RuntimeError, match="scale_adapter: expected an unmerged layer, got a merged one"):
        fastlora.scale_adapter(net, "default", 2)
    assert net.up.scaling == 5 / 3
    with pytest.raises(ValueError, match="QLinear: expected the name of an adapter, got 'x'"):
        QLinear(8, 8, rank=2).scale_adapter("x", 2)
