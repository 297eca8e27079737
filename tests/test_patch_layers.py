"""fastlora.patch: which layers it takes, what it says of the others, and what becomes of their weights."""

import copy
from importlib import metadata

import pytest
import torch
from needs import fsdp_on_cpus
from peft_models import (
    BASES,
    added,
    assert_same_step,
    bnb,
    llama,
    logits,
    lora,
    peft,
    step,
    transformers,
    twin,
)
from torch import nn

import fastlora

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
UP = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def _one_thread(keep_threads):
    torch.set_num_threads(1)


def reasons(model):
    return {
        s.name.removeprefix("base_model.model."): s.reason for s in fastlora.patch(model, show=False).skipped
    }


# --- the report and the errors ----------------------------------------------------------------------------


def test_the_report_says_what_was_done(capsys):
    model = lora(llama())
    report = fastlora.patch(model)
    printed = capsys.readouterr().out
    assert "model.layers.*.mlp.up_proj" in str(report)
    assert "14 layers patched, 0 left as they were" in str(report)
    assert "14 layers patched, 0 left as they were" in printed
    assert {p.base for p in report.patched} == {"bitsandbytes"}
    up = next(p for p in report.patched if p.name == UP)
    assert (up.out_features, up.in_features, up.adapters) == (128, 64, {"default": 4})
    assert up.does == "base and adapter in one product"
    assert {p.does for p in report.patched if not p.adapters} == {"fused"}
    again = fastlora.patch(model, show=False)
    assert not again.patched
    assert {s.reason for s in again.skipped} == {"already patched"}
    assert "already patched" in str(again)


def test_variants_are_named():
    model = lora(llama(), use_dora=True)
    added(model, "plain", 2)
    does = {p.does for p in fastlora.patch(model, show=False).patched if p.adapters}
    assert does == {"base and adapter in one product, Dora by PEFT"}
    fastlora.unpatch(model)
    model.delete_adapter("plain")
    does = {p.does for p in fastlora.patch(model, show=False).patched if p.adapters}
    assert does == {"base fused, Dora by PEFT"}
    dense = lora(llama("dense"), use_dora=True)
    assert set(reasons(dense).values()) == {"its base is dense, and its adapters are Dora"}


def test_other_bitsandbytes_layers_are_left():
    assert set(reasons(lora(llama(quant_type="fp4"))).values()) == {"its codes are FP4, not NF4"}
    model = nn.ModuleDict({"int8": bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)})
    assert reasons(model) == {"int8": "a Linear8bitLt, which computes in its own way"}
    model = nn.ModuleDict({"raw": bnb.nn.Linear4bit(64, 64, quant_type="nf4")})
    assert reasons(model) == {"raw": "its weight is not quantised yet"}
    odd = bnb.nn.Linear4bit(65, 64, quant_type="nf4").to("cpu")
    assert reasons(nn.ModuleDict({"odd": odd})) == {
        "odd": "its rows are not whole bytes (in_features is odd)"
    }
    other = bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    other.weight.quant_state.code = other.weight.quant_state.code * 0.5
    assert reasons(nn.ModuleDict({"map": other})) == {"map": "weight.quant_map holds other values than NF4's"}


def test_other_layers_of_peft_are_left():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    model = peft.get_peft_model(
        transformers.GPT2LMHeadModel(config),
        peft.LoraConfig(target_modules=["c_attn", "wte"], fan_in_fan_out=True),
    )
    assert reasons(model) == {
        "transformer.wte": "PEFT's Embedding, which computes in its own way",
        "transformer.h.0.attn.c_attn": "its base's weight is transposed (fan_in_fan_out)",
    }
    loha = peft.get_peft_model(llama("dense"), peft.LoHaConfig(target_modules=["q_proj"]))
    assert set(reasons(loha).values()) == {"a Linear of peft.tuners.loha.layer, which is not LoRA"}
    # Its 4-bit base is taken where the layer is not.
    ia3 = peft.get_peft_model(llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    patched = twin(ia3)
    assert_same_step(step(patched), step(ia3))


def test_other_bases_are_left():
    class Own(nn.Linear):
        pass

    def replaced(kind):
        model = llama("dense")
        for block in model.model.layers:
            block.mlp.up_proj = kind(64, 128)
        return lora(model, target_modules=["up_proj"])

    assert set(reasons(replaced(Own)).values()) == {"a Own, which computes in its own way"}
    assert set(reasons(replaced(lambda k, n: nn.Linear(k, n).double())).values()) == {
        "its base is torch.float64"
    }
    on_qlinear = replaced(lambda k, n: fastlora.QLinear(k, n, rank=0))
    before = logits(on_qlinear)
    assert set(reasons(on_qlinear).values()) == {"over a QLinear, where it is fused already"}
    assert torch.equal(logits(on_qlinear), before)
    model = lora(llama(), target_modules=["up_proj"])
    layer = model.get_submodule(UP)
    layer.forward = lambda x: x
    assert reasons(model) == {"model.layers.0.mlp.up_proj": "somebody has replaced its forward"}


def test_errors(monkeypatch):
    with pytest.raises(TypeError, match=r"^patch: expected a torch.nn.Module, got dict$"):
        fastlora.patch({})
    with pytest.raises(TypeError, match=r"^unpatch: expected a torch.nn.Module, got dict$"):
        fastlora.unpatch({})
    with pytest.raises(
        ValueError, match=r"^patch: expected a model with LoRA layers of PEFT or 4-bit .* Linear"
    ):
        fastlora.patch(nn.Linear(3, 3))
    model = lora(llama())
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.12.0" if name == "peft" else version(name))
    with pytest.raises(ImportError, match=r"^patch: expected peft >= 0.20, got 0.12.0$"):
        fastlora.patch(model)

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ImportError, match=r"^patch: expected peft >= 0.20, got no peft installed$"):
        fastlora.patch(model)
    assert fastlora.unpatch(model) == 0


# --- the 4-bit weight -------------------------------------------------------------------------------------


def test_no_weight_is_copied():
    model = lora(llama())
    held = {p.data_ptr() for p in model.parameters()}
    fastlora.patch(model, show=False)
    step(model)
    logits(model.eval())
    count = 0
    for layer in model.modules():
        if "_kept" in layer.__dict__:
            codes, scales, nested, *_ = layer._kept.packed
            assert codes.data_ptr() == layer.weight.data_ptr()
            assert scales.data_ptr() == layer.weight.quant_state.absmax.data_ptr()
            assert nested.nbytes <= layer.weight.nbytes / 64
            count += 1
    assert count == 14
    assert {p.data_ptr() for p in model.parameters()} == held


def test_a_repacked_weight_is_laid_out_as_it_was():
    layer = bnb.nn.Linear4bit(64, 96, quant_type="nf4", compute_dtype=torch.bfloat16).to("cpu").eval()
    codes, state = layer.weight.data.clone(), layer.weight.quant_state
    layer.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, state)
    scales = state.absmax.clone()
    report = fastlora.patch(nn.ModuleDict({"one": layer}), show=False)
    assert report.patched[0].does == "fused, scales in bfloat16 as bitsandbytes' evaluation left them"
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(state.absmax, scales.t().reshape(-1).float())
    assert not state.packing_format_for_cpu
    x = torch.randn(5, 64)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, state).double()
    torch.testing.assert_close(layer(x), (x.double() @ weight.t() + layer.bias).float(), rtol=2e-2, atol=2e-2)
    # And where somebody repacks it later.
    want = layer(x)
    layer.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, state)
    assert torch.equal(layer(x), want)
    assert torch.equal(layer.weight.data, codes)


def test_evaluation_changes_no_weight():
    model = lora(llama(dtype=torch.bfloat16))
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = True  # bitsandbytes would repack it
    fastlora.patch(model, show=False)
    before = copy.deepcopy(model.state_dict())
    with model.disable_adapter():
        logits(model.eval())
    logits(model, adapter_names=["default", "__base__", "default", "__base__"])
    logits(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_changed_weight_is_seen():
    model = lora(llama())
    patched = twin(model)
    logits(patched)
    other = lora(llama())
    with torch.no_grad():
        for name, linear in other.named_modules():
            if name.endswith("gate_proj"):
                dense = torch.randn(linear.out_features, linear.in_features)
                linear.weight = bnb.nn.Params4bit(dense, quant_type="nf4", module=linear).to("cpu")
    for name, linear in patched.named_modules():
        if name.endswith("gate_proj"):
            linear.weight = copy.deepcopy(other.get_submodule(name).weight)
    torch.testing.assert_close(logits(patched), logits(other), **CLOSE)
    for name, linear in patched.named_modules():  # in place
        if name.endswith("gate_proj"):
            linear.weight.quant_state.state2.absmax.mul_(2)
            other.get_submodule(name).weight.quant_state.state2.absmax.mul_(2)
    torch.testing.assert_close(logits(patched), logits(other), **CLOSE)


def test_blocks_across_rows_are_read_as_they_were_quantised():
    layer = bnb.nn.Linear4bit(96, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    weight = fastlora.NF4Weight.from_bitsandbytes(layer.state_dict())
    report = fastlora.patch(nn.ModuleDict({"one": layer}), show=False)
    assert report.patched[0].does == "fused, blocks across rows (which bitsandbytes misreads on a CPU)"
    x = torch.randn(7, 96)
    want = x.double() @ weight.dequantize(torch.float32).double().t()
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-4, atol=1e-5)


def test_moving_and_casting():
    model = lora(llama())
    patched = twin(model)
    for one in (model, patched):
        one.to("cpu").to(torch.bfloat16).to(torch.float32)
    torch.testing.assert_close(logits(patched), logits(model), **CLOSE)


# --- around the layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@fsdp_on_cpus
def test_leaves_wrapped_by_fsdp_are_called(base, tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not distributed.is_gloo_available():
        pytest.skip("this torch was built without gloo")
    model = lora(llama(base))
    patched = twin(model)
    want = step(model)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name, leaf in list(patched.named_modules()):
            if name.endswith(("lora_A.default", "lora_B.default")):
                fully_shard(leaf, mesh=mesh)
        loss, grads = step(patched)
        assert all(hasattr(g, "full_tensor") for g in grads.values())
        assert_same_step((loss, {name: g.full_tensor() for name, g in grads.items()}), want)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("base", BASES)
def test_accelerates_hooks_are_kept(base, monkeypatch):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model = lora(llama(base))
    want = step(model)
    for name, module in model.named_modules():
        if name.endswith("_proj") or name.endswith("base_layer"):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    fastlora.patch(model, show=False)
    monkeypatch.setattr(bnb, "matmul_4bit", None)  # bitsandbytes' own product, which is not called any more
    assert_same_step(step(model), want)
    monkeypatch.undo()
    fastlora.unpatch(model)
    assert_same_step(step(model), want)
    for module in model.modules():
        remove_hook_from_module(module)
    assert_same_step(step(model), want)


def test_a_layer_that_peft_takes_for_dense():
    model = llama()
    model.is_loaded_in_4bit = False
    model = lora(model)
    assert type(model.get_submodule(UP)) is peft.tuners.lora.layer.Linear
    assert_same_step(step(twin(model)), step(model))
