"""PEFT on QLinear: held to stock PEFT over the dense layers that the packed weights mean."""

import copy
import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp
from needs import fsdp_of_bytes, fsdp_on_cpus, traces_peft
from torch import nn

peft = pytest.importorskip("peft", minversion="0.20", reason="PEFT is what these layers belong to")

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict  # noqa: E402
from peft.tuners.lora.layer import Linear as StockLinear  # noqa: E402
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap  # noqa: E402

import fastlora  # noqa: E402
from fastlora import QLinear, quantize_nf4  # noqa: E402
from fastlora.integrations import peft_hook  # noqa: E402
from fastlora.integrations.peft_layer import FusedLoraLayer, LoraQLinear  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
K, N, R = 64, 96, 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate = nn.Linear(K, N), nn.Linear(K, N, bias=False)
        self.down = nn.Linear(N, K)
        self.config = {"model_type": "net"}

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)) * self.gate(x))


def config(**kwargs):
    return LoraConfig(**({"r": R, "lora_alpha": 6, "target_modules": ["up", "gate", "down"]} | kwargs))


def bases():
    """(QLinear model, dense model of the weights that it packs)."""
    torch.manual_seed(0)
    dense = Net().eval()
    with torch.no_grad():
        for p in dense.parameters():
            p.normal_(std=0.2)
    ours = copy.deepcopy(dense)
    fastlora.convert(ours, rank=0, progress=False)
    for name, layer in ours.named_modules():
        if isinstance(layer, QLinear):
            dense.get_submodule(name).weight.data.copy_(layer.dequantize())
    return ours, dense


def twins(*configs, names=("default", "b", "c"), pair=None):
    """Both as peft models of the same adapters, which do something."""
    ours, theirs = pair or bases()
    for name, one in zip(names, configs or (config(),), strict=False):
        if name == names[0]:
            ours, theirs = (get_peft_model(m, copy.deepcopy(one), name).eval() for m in (ours, theirs))
        else:
            for m in (ours, theirs):
                m.add_adapter(name, copy.deepcopy(one))
    torch.manual_seed(1)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data += 0.2 * torch.randn_like(p)
    copy_adapters(ours, theirs)
    return ours, theirs


def copy_adapters(to, source):
    values = dict(source.named_parameters())
    for name, p in to.named_parameters():
        if "lora_" in name:
            p.data.copy_(values[name].data)


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraQLinear)}


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".base_layer." in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_close(got, want, rtol=1e-4):
    """Relative distance of all of it, and of each element by the largest."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    got, want = got.detach().double(), want.detach().double()
    scale = want.abs().max().item() or 1.0
    assert (got - want).norm() <= rtol * want.norm() + 1e-7
    assert (got - want).abs().max() <= 4 * rtol * scale + 1e-7


def grads_of(model, x, *args, **kwargs):
    x = x.clone().requires_grad_()
    y = model(x, *args, **kwargs)
    y.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return y.detach(), found | {"x": x.grad}


@pytest.fixture
def x():
    return torch.randn(3, 5, K, generator=torch.Generator().manual_seed(2))


def offset_bases():
    """bases() whose packed weights have offsets."""
    ours, dense = bases()
    for name, layer in ours.named_modules():
        if isinstance(layer, QLinear):
            values = 0.1 * torch.randn(layer.out_features, 4)
            layer._set_base(layer.quantized_weight.with_offsets(values))
            dense.get_submodule(name).weight.data.copy_(layer.dequantize())
    return ours, dense


def test_a_base_with_offsets(x):
    ours, theirs = twins(pair=offset_bases())
    (y, grads), (want, expected) = grads_of(ours, x), grads_of(theirs, x)
    assert_close(y, want)
    assert len(grads) == 7  # of x, and of two matrices a layer
    for name, grad in grads.items():
        assert_close(grad, expected[name])
    before = bits(ours)
    assert any("weight_offsets" in name for name in before)
    held = {name: layer.qlinear.weight_offsets for name, layer in layers(ours).items()}
    ours.merge_adapter()
    for name, layer in layers(ours).items():
        assert torch.equal(layer.qlinear.weight_offsets, held[name])  # the sum is quantised about them
        dense = theirs.get_submodule(name)
        merged = dense.base_layer.weight + dense.get_delta_weight("default")
        assert layer.qlinear.quantized_weight == quantize_nf4(
            merged, offsets=layer.qlinear.quantized_weight.offset_values
        )
    ours.unmerge_adapter()
    assert same(bits(ours), before)
    assert all(layer.qlinear.weight_offsets is held[name] for name, layer in layers(ours).items())
    assert_close(ours(x), want)


def test_pissa_on_a_base_with_offsets(x):
    ours, dense = offset_bases()
    held = {
        name: m.quantized_weight.offset_values for name, m in ours.named_modules() if name in ("up", "down")
    }
    want = dense(x)
    model = get_peft_model(ours, config(init_lora_weights="pissa", lora_alpha=R)).eval()
    for name, layer in layers(model.base_model.model).items():
        if name in held:
            assert torch.equal(layer.qlinear.quantized_weight.offset_values, held[name])
    assert (model(x) - want).norm() < 0.2 * want.norm()


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_on_a_calibrated_base(iterations):
    """The alternations quantise about the offsets that ICQ has found."""
    torch.manual_seed(0)
    dense = Net().eval()
    ours = copy.deepcopy(dense)
    fastlora.convert(ours, rank=0, blocksize=32, calibrate="icq", progress=False)
    calibrated = {name: m.quantized_weight for name, m in ours.named_modules() if isinstance(m, QLinear)}
    model = get_peft_model(ours, config())
    fastlora.initialize_loftq(model, dense, iterations=iterations)
    for name, layer in layers(model.base_model.model).items():
        base = layer.qlinear.quantized_weight
        assert torch.equal(base.offsets, calibrated[name].offsets)
        assert (base == calibrated[name]) == (iterations == 1)
        want = dense.get_submodule(name).weight
        start = base.dequantize() + layer.get_delta_weight("default")
        assert (start - want).norm() < 0.97 * (calibrated[name].dequantize() - want).norm()


# --- which layer -----------------------------------------------------------------------------------------


def test_dispatch_to_the_fused_layer():
    ours, dense = bases()
    ours.extra = nn.Linear(K, K)
    model = get_peft_model(ours, config(target_modules="all-linear"))
    found = layers(model.base_model.model)
    assert list(found) == ["up", "gate", "down"]
    for layer in found.values():
        assert isinstance(layer, FusedLoraLayer)
        assert layer.unfused() is None
        assert {p.dtype for p in layer.lora_A.parameters()} == {torch.float32}
        assert repr(layer).startswith("lora.LoraQLinear(")
    assert type(model.base_model.model.extra) is StockLinear
    assert type(get_peft_model(dense, config()).base_model.model.up) is StockLinear
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_the_hook_waits_for_peft_and_is_put_in_once():
    code = (
        "import sys, fastlora, torch\n"
        "assert 'peft' not in sys.modules and 'transformers' not in sys.modules\n"
        "import peft, peft.tuners.lora.model as model\n"
        "assert hasattr(model.dispatch_default, '_fastlora')\n"
        "assert not any(type(f).__module__.startswith('fastlora') for f in sys.meta_path)\n"
        "layer = torch.nn.Sequential(fastlora.QLinear(8, 8, rank=0))\n"
        "made = peft.get_peft_model(layer, peft.LoraConfig(target_modules=['0']))\n"
        "print(type(made.base_model.model[0]).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "LoraQLinear"
    module = sys.modules["peft.tuners.lora.model"]
    before = module.dispatch_default
    peft_hook.install()
    assert module.dispatch_default is before


def test_other_ways_in():
    injected = peft.inject_adapter_in_model(config(), bases()[0])
    assert type(injected.up) is LoraQLinear
    mixed = peft.PeftMixedModel(bases()[0], config())
    assert type(mixed.base_model.model.up) is LoraQLinear


def test_a_layer_over_another_peft_method(x):
    ours, dense = bases()
    models = []
    for m in (ours, dense):
        torch.manual_seed(3)
        models.append(
            peft.PeftMixedModel(m, peft.AdaLoraConfig(target_modules=["up"], init_r=2, total_step=9))
        )
        models[-1].add_adapter("b", config(target_modules=["up"], init_lora_weights=False))
        models[-1].set_adapter(["default", "b"])
        models[-1].eval()
    assert_close(models[0](x), models[1](x))


@pytest.mark.parametrize("named", [False, True])
def test_adapters_of_the_layers_own_are_refused(named):
    model = Net()
    fastlora.convert(model, rank=0 if named else 2, progress=False)
    if named:
        model.up.add_adapter("a", 2, 4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    has = r"\['a'\]" if named else r"\['default'\]"
    with pytest.raises(ValueError, match=f"expected a layer without adapters of its own, got up with {has}"):
        get_peft_model(model, config())
    assert type(model.up) is QLinear
    assert same(before, dict(model.named_parameters()))


def test_an_adapter_that_the_base_is_given_later_counts(x):
    ours, _ = twins()
    before = ours(x)
    base = layers(ours)["base_model.model.up"].base_layer
    base.add_adapter("late", 2, 4)
    nn.init.normal_(base.adapters["late"].lora_B)
    assert "adapters of its own" in layers(ours)["base_model.model.up"].unfused()
    assert_close(ours(x), before)
    base.set_adapter("late")
    assert not torch.allclose(ours(x), before, atol=1e-2)


def test_a_parameter_as_a_target_is_refused():
    with pytest.raises(
        ValueError, match=r"expected the layer in target_modules, got .* in target_parameters"
    ):
        get_peft_model(bases()[0], LoraConfig(target_modules=[], target_parameters=["up.weight"]))


def test_fan_in_fan_out_is_turned_off():
    with pytest.warns(UserWarning, match="set to False"):
        model = get_peft_model(bases()[0], config(fan_in_fan_out=True))
    assert model.peft_config["default"].fan_in_fan_out is False


def test_an_old_peft_is_named(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.19.1")
    with pytest.raises(RuntimeError, match=r"expected peft 0\.20 or newer, got 0\.19\.1"):
        get_peft_model(bases()[0], config())


# --- forward and gradients -------------------------------------------------------------------------------

CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True, "target_modules": ["up", "down"]},
    "patterns": {"rank_pattern": {"up": 7}, "alpha_pattern": {"gate": 1}},
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_gradients(name, x):
    ours, theirs = twins(config(**CONFIGS[name]))
    assert all(layer.unfused() is None for layer in layers(ours).values())
    (y, mine), (want, its) = grads_of(ours, x), grads_of(theirs, x)
    assert_close(y, want)
    assert mine.keys() == its.keys()
    for key, value in mine.items():
        assert_close(value, its[key], rtol=5e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype, x):
    ours, theirs = twins()
    for layer in layers(ours).values():
        assert layer(torch.zeros(2, layer.in_features, dtype=dtype)).dtype == dtype
    y = ours.base_model.model.up(x.to(dtype))
    assert_close(y.float(), theirs.base_model.model.up(x), rtol=2e-2)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            got, want = ours(x), theirs(x)
        assert_close(got, want, rtol=2e-2)


@pytest.mark.parametrize("second", [{"r": 7}, {"r": 3, "lora_bias": True}, {"use_dora": True}], ids=str)
def test_several_active_adapters(second, x):
    targets = {"target_modules": ["up", "down"]}
    ours, theirs = twins(config(**targets), config(**targets, **second), config(target_modules=["gate"]))
    for m in (ours, theirs):
        m.base_model.set_adapter(["default", "b", "c"])
    (y, mine), (want, its) = grads_of(ours, x), grads_of(theirs, x)
    assert_close(y, want)
    assert mine.keys() == its.keys()
    for key, value in mine.items():
        assert_close(value, its[key], rtol=5e-4)


def test_no_adapter_of_a_layer_is_active(x):
    ours, theirs = twins(config(), config(target_modules=["gate"]))
    for m in (ours, theirs):
        m.set_adapter("b")
    assert_close(ours(x), theirs(x))


def test_dropout_is_the_ops(x):
    ours, _ = twins(config(lora_dropout=0.3))
    layer = ours.train().base_model.model.up
    weight, a, b = (
        layer.base_layer.quantized_weight,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
    )
    torch.manual_seed(5)
    got = layer(x)
    torch.manual_seed(5)
    want = fastlora.nf4_linear(x, weight, layer.base_layer.bias, a, b, layer.scaling["default"], dropout=0.3)
    assert torch.equal(got, want)
    assert not torch.equal(layer(x), want)
    assert torch.equal(ours.eval()(x), ours(x))


def test_dropout_of_several_active_adapters(x):
    """Each has a mask of its own; one of them is the op's, the others are torch's."""
    ours, _ = twins(config(lora_dropout=0.3), config(lora_dropout=0.6), config())
    ours.train().base_model.set_adapter(["default", "b", "c"])
    layer = ours.base_model.model.up
    torch.manual_seed(5)
    got = layer(x)
    torch.manual_seed(5)
    want = layer.base_layer(x)
    for name in ("default", "b", "c"):
        want = (
            want + layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](x))) * layer.scaling[name]
        )
    assert_close(got, want)
    ours.base_model.set_adapter(["default", "b"])
    many = torch.stack([layer(x) for _ in range(600)]).mean(0)
    ours.eval()
    assert_close(many, layer(x), rtol=0.1)


def test_dora_with_dropout(x):
    """Both draw the same mask."""
    ours, theirs = twins(config(use_dora=True, lora_dropout=0.4, target_modules=["up"]))
    ours.train(), theirs.train()
    torch.manual_seed(5)
    y, mine = grads_of(ours, x)
    torch.manual_seed(5)
    want, its = grads_of(theirs, x)
    assert_close(y, want)
    for key, value in mine.items():
        assert_close(value, its[key], rtol=5e-4)


def test_disabled_adapters_are_the_base(x):
    base, _ = bases()
    want = base(x)
    ours, _ = twins()
    with ours.disable_adapter():
        assert torch.equal(ours(x), want)
    assert not torch.allclose(ours(x), want, atol=1e-2)


# --- a batch of several adapters -------------------------------------------------------------------------

NAMES = ["b", "__base__", "default", "c", "default"]


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3)], ids=str)
@pytest.mark.parametrize("low_bias", [False, True])
def test_mixed_batch(shape, low_bias):
    both = ["up", "down"]
    ours, theirs = twins(
        config(target_modules=both, lora_bias=low_bias),
        config(r=7, use_rslora=True),
        config(target_modules=["gate"]),
    )
    x = torch.randn(*shape, K, generator=torch.Generator().manual_seed(4))
    for layer in layers(ours).values():
        assert layer.unfused({"adapter_names": NAMES}) is None
    with torch.no_grad():
        assert_close(ours(x, adapter_names=NAMES), theirs(x, adapter_names=NAMES))
        assert_close(ours(x, adapter_names=["__base__"] * 5), theirs(x, adapter_names=["__base__"] * 5))
        # A row does what it does by itself.
        ours.set_adapter("b")
        assert_close(ours(x, adapter_names=NAMES)[0], ours(x[:1])[0])


def test_mixed_batch_has_gradients():
    ours, theirs = twins(config(), config(r=7), config())
    x = torch.randn(5, 3, K, generator=torch.Generator().manual_seed(4))
    for m in (ours, theirs):
        m.requires_grad_(False)
        for name, p in m.named_parameters():
            p.requires_grad_("lora_" in name)
    (y, mine), (want, its) = (grads_of(m, x, adapter_names=NAMES) for m in (ours, theirs))
    assert_close(y, want)
    for key, value in its.items():
        assert_close(mine[key], value, rtol=5e-4)


def test_what_peft_refuses_of_a_mixed_batch(x):
    ours, _ = twins(config(), config(use_dora=True))
    names = ["default", "b", "default"]
    with pytest.raises(ValueError, match=r"adapter_names.* when DoRA is enabled"):
        ours(x, adapter_names=names)
    with pytest.raises(ValueError, match="non-existing adapter"):
        ours(x, adapter_names=["default", "typo", "default"])
    with pytest.raises(ValueError, match="same as the number of inputs"):
        ours(x, adapter_names=["default"])
    ours.merge_adapter(["default"])
    with pytest.raises(ValueError, match="when there are merged adapters"):
        ours(x, adapter_names=["default"] * 3)


# --- when peft's own way is taken ------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["base_layer", "lora_A.default", "lora_B.default"])
def test_hooks_are_called(where, x):
    ours, theirs = twins()
    layer = ours.base_model.model.up
    seen = []
    handle = layer.get_submodule(where).register_forward_hook(lambda *_: seen.append(1))
    assert "hooks" in layer.unfused()
    assert_close(ours(x), theirs(x))
    assert seen == [1]
    handle.remove()
    assert layer.unfused() is None


@pytest.mark.parametrize(
    "leaves",
    [pytest.param(True, marks=fsdp_on_cpus), pytest.param(False, marks=fsdp_of_bytes)],
)
def test_sharded_by_fsdp(leaves, tmp_path, x):
    """Leaf by leaf the modules have to be called, to be gathered; as a layer it is whole inside its call."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        ours, theirs = twins()
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for layer in layers(ours).values():
            for part in (layer.lora_A["default"], layer.lora_B["default"]) if leaves else (layer,):
                dist.fsdp.fully_shard(part, mesh=mesh)
            assert (layer.unfused() is None) is not leaves
        (y, mine), (want, its) = grads_of(ours, x), grads_of(theirs, x)
        assert_close(y, want)
        for key, value in mine.items():
            assert_close(value.full_tensor() if hasattr(value, "full_tensor") else value, its[key], rtol=5e-4)
    finally:
        dist.destroy_process_group()


def test_an_unusual_dropout_and_unknown_arguments_go_peft_s_way(x):
    ours, theirs = twins(config(lora_dropout=1.0))
    layer = ours.train().base_model.model.up
    assert "dropout" in layer.unfused()
    assert_close(ours(x), theirs.train()(x))
    with pytest.raises(TypeError, match="unexpected keyword"):
        layer(x, scale=2)


VARIANTS = {
    "MiCALinearVariant": lambda: {"init_lora_weights": "mica"},
    "VeloraLinearVariant": lambda: {"velora_config": peft.VeloraConfig(num_groups=4)},
    "ALoraLinearVariant": lambda: {"alora_invocation_tokens": [1]},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_peft_s_own(name, x):
    if name.startswith("Velora") and not hasattr(peft, "VeloraConfig"):
        pytest.skip("this peft has no VeLoRA")
    ours, theirs = twins(config(**VARIANTS[name]()))
    kwargs = {"alora_offsets": [2, None, 5]} if name.startswith("ALora") else {}
    assert name in layers(ours)["base_model.model.up"].unfused()
    ours.train(), theirs.train()
    (y, mine), (want, its) = grads_of(ours, x, **kwargs), grads_of(theirs, x, **kwargs)
    assert_close(y, want)
    assert mine.keys() == its.keys()
    for key, value in mine.items():
        assert_close(value, its[key], rtol=5e-4)


# --- merging ---------------------------------------------------------------------------------------------


def test_merging_quantises_the_sum_and_unmerging_gives_the_bits_back(x):
    ours, _ = twins()
    before, y = bits(ours), ours(x)
    layer = ours.base_model.model.up
    held = [layer.base_layer.weight, layer.base_layer.weight_scales, layer.base_layer.bias]
    own = QLinear.from_linear(nn.Linear(K, N), rank=R, alpha=6)  # what QLinear.merge makes of the same
    own._set_base(layer.base_layer.quantized_weight)
    own.lora_A.data.copy_(layer.lora_A["default"].weight)
    own.lora_B.data.copy_(layer.lora_B["default"].weight)
    own.merge()
    ours.merge_adapter()
    assert layer.base_layer.quantized_weight == own.quantized_weight
    assert_close(ours(x), y, rtol=0.2)
    assert not torch.equal(ours(x), y)
    ours.unmerge_adapter()
    assert same(bits(ours), before)
    assert torch.equal(ours(x), y)
    now = [layer.base_layer.weight, layer.base_layer.weight_scales, layer.base_layer.bias]
    assert all(a is b for a, b in zip(held, now, strict=True))
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_merging_in_turn_is_merging_at_once():
    ours, _ = twins(config(), config(r=7), config(use_dora=True))
    before = bits(ours)
    ours.merge_adapter(["default", "b", "c"], safe_merge=True)
    at_once = bits(ours)
    ours.unmerge_adapter()
    assert same(bits(ours), before)
    for name in ("default", "b", "c"):
        ours.merge_adapter([name])
    assert same(bits(ours), at_once)
    with pytest.warns(UserWarning, match="already merged"):
        ours.merge_adapter(["default"])
    with ours.disable_adapter():
        ours(torch.zeros(1, K))  # unmerges, as peft does
    assert same(bits(ours), before)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["up"]}, {"init_lora_weights": "mica"}],
    ids=str,
)
def test_the_merged_weight_is_stock_peft_s_quantised(kwargs):
    ours, theirs = twins(config(**kwargs))
    ours.merge_adapter(), theirs.merge_adapter()
    for name, layer in layers(ours).items():
        its = theirs.get_submodule(name).base_layer
        want = quantize_nf4(its.weight.data).dequantize()
        assert_close(layer.base_layer.dequantize(), want, rtol=2e-3)
        if its.bias is not None:
            assert_close(layer.base_layer.bias, its.bias)


def test_merge_and_unload_leaves_plain_layers(x):
    ours, _ = twins()
    ours.merge_adapter()
    merged, y = bits(ours), ours(x)
    ours.unmerge_adapter()
    plain = ours.merge_and_unload(safe_merge=True)
    assert type(plain.up) is QLinear
    assert torch.equal(plain(x), y)
    assert torch.equal(plain.up.weight, merged["base_model.model.up.base_layer.weight"])
    kept = twins()[0]
    before = bits(kept)
    assert torch.equal(kept.unload().up.weight, before["base_model.model.up.base_layer.weight"])


def test_a_broken_adapter_is_not_merged(x):
    ours, _ = twins(config(), config())
    ours.merge_adapter(["default"])
    before, layer = bits(ours), ours.base_model.model.up
    layer.lora_A["b"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"expected a finite sum with adapters \['b'\]"):
        ours.merge_adapter(["b"])
    assert same(bits(ours), before)
    assert layer.merged_adapters == ["default"]
    bare, _ = twins(config(lora_bias=True))
    with pytest.raises(RuntimeError, match="expected a base with a bias for default's lora_bias, got none"):
        bare.base_model.model.gate.merge()
    biased = bare.base_model.model.up
    biased.lora_B["default"].bias.data[0] = float("inf")
    with pytest.raises(ValueError, match=r"expected a finite bias with adapters \['default'\]"):
        biased.merge()
    assert not biased.merged


def test_what_torch_does_to_a_merged_layer(x):
    ours, _ = twins()
    y, before = ours(x), bits(ours)
    state = copy.deepcopy(ours.state_dict())
    ours.merge_adapter()
    copied = copy.deepcopy(ours)
    copied.unmerge_adapter()
    assert torch.equal(copied(x), y)
    moved = copy.deepcopy(ours).to(torch.float64).to(torch.float32)
    moved.unmerge_adapter()
    assert torch.equal(moved(x), y)
    ours.load_state_dict(state)  # of the base: what was merged is forgotten
    assert not ours.base_model.model.up.merged
    assert same(bits(ours), before)


# --- initialisation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_3", "olora"])
def test_what_is_taken_out_of_the_weight_is_quantised_again(init, x):
    pair = bases()
    torch.manual_seed(6)
    ours = get_peft_model(pair[0], config(init_lora_weights=init)).eval()
    torch.manual_seed(6)
    theirs = get_peft_model(pair[1], config(init_lora_weights=init)).eval()
    for name, layer in layers(ours).items():
        stock = theirs.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, stock.lora_A["default"].weight)
        assert torch.equal(layer.lora_B["default"].weight, stock.lora_B["default"].weight)
        assert layer.base_layer.quantized_weight == quantize_nf4(stock.base_layer.weight.data)
    assert_close(ours(x), theirs(x), rtol=0.2)
    ours.merge_adapter()
    with pytest.raises(RuntimeError, match="expected an unmerged layer for 'olora', got a merged one"):
        ours.add_adapter("b", config(init_lora_weights="olora"))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_initialisations_that_leave_the_weight_alone(init):
    pair = bases()
    before = {name: p.clone() for name, p in pair[0].named_parameters()}
    states = []
    for m in pair:
        torch.manual_seed(6)
        states.append(get_peft_model_state_dict(get_peft_model(m, config(init_lora_weights=init))))
    assert same(*states)
    now = {
        name.replace("base_layer.", ""): p for name, p in pair[0].named_parameters() if "lora_" not in name
    }
    assert same(now, before)


def test_layers_that_share_a_weight_share_it_no_more_after_pissa():
    model = Net()
    model.gate = nn.Linear(K, N, bias=False)
    model.gate.weight = model.up.weight
    fastlora.convert(model, rank=0, progress=False)
    assert model.gate.weight is model.up.weight
    before = model.gate.weight.clone()
    get_peft_model(model, config(target_modules=["up"], init_lora_weights="pissa"))
    assert torch.equal(model.gate.weight, before)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("loftq", "for which the dense weights are needed; call fastlora.initialize_loftq"),
        ("corda", r"expected init_lora_weights of .*, got 'corda'"),
    ],
)
def test_initialisations_that_need_the_dense_weight(init, message):
    one = config()
    one.init_lora_weights = init  # LoraConfig itself wants scipy for loftq
    with pytest.raises(ValueError, match=message):
        get_peft_model(bases()[0], one)


@pytest.mark.skipif(not hasattr(peft, "BdLoraConfig"), reason="this peft has no variant that is refused")
def test_a_variant_that_rewrites_the_layer_is_refused():
    one = config(use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["up"], nblocks=2))
    with pytest.raises(ValueError, match=r"expected plain LoRA or one of .*, got BdLoraLinearVariant"):
        get_peft_model(bases()[0], one)


def test_eva(x):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
    )
    model = LlamaForCausalLM(small)
    fastlora.convert(model, rank=0, progress=False)
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="eva")
    )
    rows = [{"input_ids": torch.randint(40, (4, 16)), "attention_mask": torch.ones(4, 16)} for _ in range(4)]
    peft.initialize_lora_eva_weights(model, rows, show_progress_bar=False)
    for layer in layers(model).values():
        a = layer.lora_A["default"].weight
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-4, rtol=0)  # principal directions of x
        assert layer.unfused() is None


def error_of(model, dense):
    """Relative distance of what the model's layers mean to the dense weights."""
    off = total = 0.0
    for name, layer in layers(model).items():
        want = dense[name.removeprefix("base_model.model.") + ".weight"]
        got = layer.base_layer.dequantize() + layer.get_delta_weight("default")
        off, total = off + (got - want).square().sum().item(), total + want.square().sum().item()
    return (off / total) ** 0.5


def test_loftq_brings_the_model_closer_to_the_dense_one(tmp_path):
    import safetensors.torch

    torch.manual_seed(0)
    net = Net()
    dense = {name: p.detach().clone() for name, p in net.named_parameters()}
    fastlora.convert(net, rank=0, progress=False)
    model = get_peft_model(net, config(r=16))
    before, start = bits(model), error_of(model, dense)
    fastlora.initialize_loftq(model, dense)
    assert same(bits(model), before)
    once = error_of(model, dense)
    layer = model.base_model.model.up
    u, s, vh = torch.linalg.svd((dense["up.weight"] - layer.base_layer.dequantize()).double())
    want = (u[:, :16] * s[:16]) @ vh[:16]
    assert_close(layer.get_delta_weight("default"), want.float(), rtol=1e-3)
    assert once < 0.8 * start
    state = get_peft_model_state_dict(model)
    state = {key: value.clone() for key, value in state.items()}
    safetensors.torch.save_file(dense, tmp_path / "model.safetensors")
    fastlora.initialize_loftq(model, tmp_path)
    assert same(get_peft_model_state_dict(model), state)
    fastlora.initialize_loftq(model, dense, iterations=5)
    assert error_of(model, dense) < once
    assert not same(bits(model), before)


def test_loftq_refuses():
    ours, dense = twins(pair=bases())
    weights = dict(bases()[1].named_parameters())
    before = get_peft_model_state_dict(ours)["base_model.model.up.lora_A.weight"].clone()
    with pytest.raises(ValueError, match="expected iterations >= 1, got 0"):
        fastlora.initialize_loftq(ours, weights, iterations=0)
    with pytest.raises(ValueError, match="expected a model with LoRA layers 'x' over QLinear, got none"):
        fastlora.initialize_loftq(ours, weights, adapter_name="x")
    with pytest.raises(
        ValueError, match="expected a model with LoRA layers 'default' over QLinear, got none"
    ):
        fastlora.initialize_loftq(dense, weights)
    del weights["down.weight"]
    weights["gate.weight"] = weights["gate.weight"].T
    message = (
        r"gate.weight: expected \(96, 64\), got \(64, 96\)\n  down.weight: expected \(64, 96\), got none"
    )
    with pytest.raises(ValueError, match=message):
        fastlora.initialize_loftq(ours, weights)
    ours.merge_adapter()
    with pytest.raises(RuntimeError, match="expected unmerged layers, got 3 that are not"):
        fastlora.initialize_loftq(ours, bases()[1])
    assert torch.equal(get_peft_model_state_dict(ours)["base_model.model.up.lora_A.weight"], before)


# --- the rest of peft's interface ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["svd", "linear", "cat", "ties_svd"])
def test_add_weighted_adapter(kind, x):
    second = config(r=R if kind == "linear" else 7)
    ours, theirs = twins(config(), second)
    for m in (ours, theirs):
        m.add_weighted_adapter(["default", "b"], [0.7, 0.4], "both", combination_type=kind, density=0.5)
        m.set_adapter("both")
    for name, layer in layers(ours).items():
        assert_close(
            layer.get_delta_weight("both"), theirs.get_submodule(name).get_delta_weight("both"), 1e-3
        )
    assert_close(ours(x), theirs(x), rtol=1e-3)


def test_scaling_can_be_changed(x):
    ours, theirs = twins()
    for m in (ours, theirs):
        for layer in m.modules():
            if hasattr(layer, "scale_layer"):
                layer.scale_layer(0.3)
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=traces_peft)])
def test_hotswap(tmp_path, x, compiled):
    """Prepared for a compiled model, ranks are padded and scalings are tensors."""
    for name, kwargs in (("one", {}), ("two", {"r": 2, "lora_alpha": 9})):
        twins(config(**kwargs))[1].save_pretrained(tmp_path / name)
    models = [PeftModel.from_pretrained(m, tmp_path / "one").eval() for m in bases()]
    wants = [PeftModel.from_pretrained(bases()[1], tmp_path / name).eval()(x) for name in ("one", "two")]
    call = models[0]
    if compiled:
        prepare_model_for_compiled_hotswap(models[0], target_rank=8)
        call = torch.compile(models[0], backend="eager", fullgraph=True)
    assert_close(call(x), wants[0])
    hotswap_adapter(models[0], tmp_path / "two", adapter_name="default")
    stance = torch.compiler.set_stance("fail_on_recompile") if compiled else warnings.catch_warnings()
    with stance:
        assert_close(call(x), wants[1])


@traces_peft
def test_compiles_into_one_graph(x):
    ours, _ = twins(config(), config(r=7))
    want = ours(x)
    y = torch.compile(ours, backend="eager", fullgraph=True)(x)
    assert torch.equal(y, want)
    torch._dynamo.reset()


def test_a_deleted_adapter_is_gone(x):
    ours, theirs = twins(config(), config(r=7))
    for m in (ours, theirs):
        m.delete_adapter("default")
    assert_close(ours(x), theirs(x))
    assert "default" not in ours.base_model.model.up.lora_A


def test_kbit_preparation_leaves_the_bits_alone(x):
    model, _ = bases()
    model.to(torch.bfloat16)
    before, y = (
        {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8},
        model(x.bfloat16()),
    )
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert same({n: p for n, p in model.named_parameters() if p.dtype == torch.uint8}, before)
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.float32}
    assert torch.equal(model(x.bfloat16()), y)


# --- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs", [{}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["up"]}], ids=str
)
def test_files_go_there_and_back(tmp_path, x, kwargs):
    ours, _ = twins(config(**kwargs))
    ours.save_pretrained(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(bases()[1], tmp_path / "ours")
    assert_close(ours(x), theirs.eval()(x))
    theirs.save_pretrained(tmp_path / "theirs")
    for low, folder in itertools.product((False, True), ("ours", "theirs")):
        back = PeftModel.from_pretrained(bases()[0], tmp_path / folder, low_cpu_mem_usage=low).eval()
        assert type(back.base_model.model.up) is LoraQLinear
        assert torch.equal(back(x), ours(x))
    files = [tmp_path / folder / "adapter_model.safetensors" for folder in ("ours", "theirs")]
    assert files[0].read_bytes() == files[1].read_bytes()
    if not kwargs:  # fastlora's own reader takes the file too
        own = bases()[0]
        fastlora.load_adapter(own, tmp_path / "ours", name="a")
        with fastlora.adapters(own, ["a"] * 3):
            assert_close(own(x), ours(x))


def test_a_pissa_adapter_is_loaded_onto_the_original_base(tmp_path, x):
    ours = get_peft_model(bases()[0], config(init_lora_weights="pissa")).eval()
    for p in ours.parameters():
        if p.requires_grad:
            p.data += 0.01 * torch.randn_like(p)
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bases()[0], tmp_path).eval()
    assert same(bits(again), bits(ours))
    assert torch.equal(again(x), ours(x))


def test_generation_of_a_mixed_batch(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=40,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    dense = LlamaForCausalLM(small).eval()
    base = copy.deepcopy(dense)
    fastlora.convert(base, rank=0, progress=False)
    one = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, copy.deepcopy(one), "a").eval()
    model.add_adapter("b", one)
    ids = torch.randint(1, 40, (3, 5))
    options = {"max_new_tokens": 6, "do_sample": False}
    names = ["b", "__base__", "a"]
    together = model.generate(input_ids=ids, adapter_names=names, **options)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=ids[i : i + 1], **options)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=ids[i : i + 1], **options)
        assert torch.equal(together[i], alone[0])
    # transformers' own mixin, without a PeftModel
    base = copy.deepcopy(dense)
    fastlora.convert(base, rank=0, progress=False)
    base.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    assert type(base.model.layers[0].self_attn.q_proj) is LoraQLinear
    base.save_pretrained(tmp_path)
    assert Path(tmp_path, "adapter_model.safetensors").is_file()
