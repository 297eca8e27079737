"""fastlora.patch: a PEFT model's losses, gradients and all that PEFT does to it are the unpatched model's."""

import copy
import io
import json
import pickle

import pytest
import torch
from peft_models import BASES, IDS, added, assert_same_step, bnb, drawn, llama, logits, lora, peft, step, twin
from torch import nn

import fastlora

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
by_base = pytest.mark.parametrize("base", BASES)


@pytest.fixture(autouse=True)
def _one_thread(keep_threads):
    torch.set_num_threads(1)


def close(got, want, **kw):
    torch.testing.assert_close(got, want, **(CLOSE | kw))


@by_base
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "r": 3},
        {"lora_bias": True},
        {"bias": "all"},
        {"use_dora": True},
        {"target_modules": "all-linear"},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 1}},
    ],
    ids=lambda o: ",".join(o) or "plain",
)
def test_a_step_is_the_stock_step(base, options):
    model = lora(llama(base), **options)
    if "lora_bias" in options:
        for name, p in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                nn.init.normal_(p, std=0.1)
    patched = twin(model)
    assert_same_step(step(patched), step(model), 3e-4 if "use_dora" in options else 3e-5)
    close(logits(patched.eval()), logits(model.eval()))


@pytest.mark.parametrize(
    "quant",
    [{}, {"compress_statistics": False}, {"quant_storage": torch.bfloat16}, {"cls": bnb.nn.LinearNF4}],
    ids=str,
)
def test_layouts_of_a_4_bit_weight(quant):
    model = lora(llama(**quant))
    patched = twin(model)
    assert_same_step(step(patched), step(model))
    layer = patched.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert layer._kept.packed[0].untyped_storage().data_ptr() == layer.weight.data_ptr(), "codes were copied"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@by_base
def test_half_precision(base, dtype):
    exact = step(lora(llama(base, dtype=dtype).float()) if base != "bitsandbytes" else lora(llama(base)))
    model = lora(llama(base, dtype=dtype), seed=1)
    patched = twin(model)
    stock, fused = step(model)[0].float(), step(patched)[0].float()
    bound = max(2 * (stock - exact[0]).abs().item(), 1e-2)
    assert (fused - exact[0]).abs() < bound
    assert logits(patched.eval()).dtype == dtype


@by_base
def test_adapters_of_16_bits(base):
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = lora(llama(base))
    added(model, "other", 2, r=6)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.bfloat16().float()  # values that both dtypes have
    exact = {}
    for active in ("default", ["default", "other"]):
        model.base_model.set_adapter(active)
        exact[str(active)] = logits(model)
    patched = twin(model)
    for name, p in patched.named_parameters():
        if "lora_" in name:
            p.data = p.data.bfloat16()
    for active in ("default", ["default", "other"]):
        patched.base_model.set_adapter(active)
        close(logits(patched), exact[str(active)])
    assert {g.dtype for name, g in step(patched)[1].items()} == {torch.bfloat16}
    prepare_model_for_compiled_hotswap(patched, target_rank=8)
    close(logits(patched), exact["['default', 'other']"])
    close(logits(patched.eval(), adapter_names=["default"] * 4), exact["default"])


@by_base
def test_autocast(base):
    model = lora(llama(base))
    patched = twin(model)
    exact = step(model)[0]
    with torch.autocast("cpu", torch.bfloat16):
        stock, fused = step(model), step(patched)
    assert (fused[0] - exact).abs() < max(2 * (stock[0] - exact).abs().item(), 1e-2)
    assert fused[1].keys() == stock[1].keys()
    assert all(fused[1][name].dtype == g.dtype for name, g in stock[1].items())
    x = torch.randn(2, 64)
    for path in ("mlp.up_proj", "mlp.gate_proj"):
        layers = [one.get_submodule(f"base_model.model.model.layers.0.{path}") for one in (model, patched)]
        with torch.autocast("cpu", torch.bfloat16):
            dtypes = [layer(x).dtype for layer in layers]
        assert dtypes[0] == dtypes[1]


@by_base
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(base, reentrant):
    model = lora(llama(base), lora_dropout=0.2)
    patched = twin(model)
    torch.manual_seed(3)
    want = step(patched)
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    patched.enable_input_require_grads()
    torch.manual_seed(3)
    assert_same_step(step(patched), want)


@by_base
def test_dropout_has_the_stock_expectation(base):
    model = lora(llama(base), lora_dropout=0.5)
    patched = twin(model)
    close(logits(patched.eval()), logits(model.eval()))
    layer = patched.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.manual_seed(0)
        want = layer(x)
        patched.train()
        many = torch.stack([layer(x) for _ in range(400)])
    assert (many[0] != many[1]).any()
    spread = many.std(0) / 400**0.5
    assert ((many.mean(0) - want).abs() < 6 * spread + 1e-5).all()


@by_base
def test_disabled_adapters(base):
    model = lora(llama(base))
    patched = twin(model)
    plain = logits(model)
    with model.disable_adapter(), patched.disable_adapter():
        bare = logits(model)
        close(logits(patched), bare)
    assert (plain - bare).abs().max() > 0.05
    close(logits(patched), plain)
    patched.base_model.disable_adapter_layers()
    close(logits(patched), bare)
    patched.base_model.enable_adapter_layers()
    close(logits(patched), plain)


@pytest.mark.parametrize("base", ["bitsandbytes", "dense"])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merging(base, safe, options):
    model = lora(llama(base), **options)
    patched = twin(model)
    before = logits(patched)
    for one in (model, patched):
        one.merge_adapter(safe_merge=safe)
    merged = logits(model)
    close(logits(patched), merged)
    with model.disable_adapter(), patched.disable_adapter():  # which unmerges
        close(logits(patched), logits(model))
    for one in (model, patched):
        one.merge_adapter(safe_merge=safe)
        one.unmerge_adapter()
    close(logits(patched), logits(model))
    if base == "dense":
        close(logits(patched), before)
    merged = patched.merge_and_unload()
    assert not any(isinstance(one, peft.tuners.lora.LoraLayer) for one in merged.modules())
    close(logits(merged), logits(model.merge_and_unload()))


@by_base
def test_several_adapters(base):
    model = lora(llama(base))
    added(model, "other", 2, r=6, use_rslora=True)
    patched = twin(model)
    for active in ("default", "other", ["default", "other"]):
        for one in (model, patched):
            one.base_model.set_adapter(active)
        assert_same_step(step(patched), step(model))
    for one in (model, patched):
        one.base_model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "sum", combination_type="cat")
        one.base_model.set_adapter("sum")
    close(logits(patched), logits(model))
    for one in (model, patched):
        one.delete_adapter("sum")
        one.base_model.set_adapter("other")
    close(logits(patched), logits(model))


@by_base
def test_an_adapter_of_fewer_layers_and_one_added_later(base):
    model = lora(llama(base))
    patched = twin(model)
    for one in (model, patched):
        added(one, "later", 3, target_modules=["v_proj", "k_proj"])
        one.base_model.set_adapter(["later", "default"])
    assert_same_step(step(patched), step(model))
    report = fastlora.patch(patched, show=False)
    assert {p.name.rpartition(".")[2] for p in report.patched} == {"k_proj"}
    assert_same_step(step(patched), step(model))


@by_base
@pytest.mark.parametrize("grad", [False, True])
def test_mixed_batch(base, grad):
    if grad and base == "bitsandbytes":
        pytest.skip("PEFT adds to bitsandbytes' output in place, which autograd refuses")
    model = lora(llama(base))
    added(model, "other", 2, r=6)
    added(model, "few", 3, r=2, target_modules=["v_proj"])
    patched = twin(model).eval()
    model.eval()
    for names in (
        ["other", "__base__", "default", "few"],
        ["default"] * 4,
        ["__base__"] * 4,
        ["few", "few", "other", "few"],
    ):
        if not grad:
            close(logits(patched, adapter_names=names), logits(model, adapter_names=names))
        elif set(names) != {"__base__"}:
            for one in (model, patched):
                one.set_requires_grad(["default", "other", "few"])
            assert_same_step(step(patched, adapter_names=names), step(model, adapter_names=names))
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        logits(patched, adapter_names=["default"])


@by_base
def test_mixed_batch_runs_no_loop(base, monkeypatch):
    model = lora(llama(base))
    added(model, "other", 2, r=6)
    patched = twin(model).eval()
    stock = peft.tuners.lora.layer.LoraLayer
    monkeypatch.setattr(stock, "_mixed_batch_forward", None)
    if base == "bitsandbytes":
        monkeypatch.setattr(peft.tuners.lora.bnb.Linear4bit, "_mixed_batch_forward", None)
    logits(patched, adapter_names=["default", "other", "__base__", "other"])


@by_base
def test_generation(base):
    model = lora(llama(base)).eval()
    patched = twin(model)
    ask = {"input_ids": IDS[:, :5], "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(patched.generate(**ask), model.generate(**ask))


@by_base
def test_files(base, tmp_path):
    model = lora(llama(base))
    patched = twin(model)
    model.save_pretrained(tmp_path / "stock")
    patched.save_pretrained(tmp_path / "fused")
    files = {kind: tmp_path / kind / "adapter_model.safetensors" for kind in ("stock", "fused")}
    assert files["fused"].read_bytes() == files["stock"].read_bytes()
    configs = [json.loads((file.parent / "adapter_config.json").read_text()) for file in files.values()]
    for config in configs:
        config["target_modules"].sort()  # PEFT holds a set of them
    assert configs[0] == configs[1]
    patched.load_adapter(tmp_path / "stock", "again")
    want = logits(patched)
    drawn(patched, "default", 9)
    patched.set_adapter("again")
    close(logits(patched), want)
    anew = peft.PeftModel.from_pretrained(llama(base), tmp_path / "fused")
    fastlora.patch(anew, show=False)
    close(logits(anew), want)


@by_base
def test_hotswap(base, tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    other = lora(llama(base), seed=5, r=2, lora_alpha=3)
    other.save_pretrained(tmp_path)
    want = logits(other)
    patched = twin(lora(llama(base)))
    prepare_model_for_compiled_hotswap(patched, target_rank=8)
    before = logits(patched)
    close(before, logits(lora(llama(base))))
    hotswap_adapter(patched, tmp_path, adapter_name="default")
    close(logits(patched), want)
    if base != "dense":
        grads = step(patched)[1]
        assert all(g.isfinite().all() for g in grads.values())
    patched.eval()
    close(logits(patched, adapter_names=["default"] * 4), want)


@by_base
def test_freezing(base):
    model = lora(llama(base))
    for name, p in model.named_parameters():
        if "lora_A" in name or "layers.0.mlp.up_proj" in name:
            p.requires_grad_(False)
    patched = twin(model)
    assert_same_step(step(patched), step(model))


@by_base
def test_unpatch_restores_everything(base):
    model = lora(llama(base))
    before = [(type(one), dict(one.__dict__)) for one in model.modules()]
    parameters = dict(model.named_parameters())
    want = step(model)
    report = fastlora.patch(model, show=False)
    assert list(model.state_dict()) == list(model.state_dict())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    step(model)
    logits(model)
    count = fastlora.unpatch(model)
    assert count >= len(report.patched)
    assert fastlora.unpatch(model) == 0
    for one, (cls, held) in zip(model.modules(), before, strict=True):
        assert type(one) is cls
        assert one.__dict__.keys() == held.keys()
    again = step(model)
    assert torch.equal(again[0], want[0])
    assert all(torch.equal(again[1][name], g) for name, g in want[1].items())


@by_base
def test_copies_and_pickles(base):
    patched = twin(lora(llama(base)))
    want = logits(patched)
    other = copy.deepcopy(patched)
    drawn(other, "default", 8)
    close(logits(patched), want)
    assert (logits(other) - want).abs().max() > 0.01
    file = io.BytesIO()
    torch.save(patched, file)
    file.seek(0)
    close(logits(torch.load(file, weights_only=False)), want)
    layer = patched.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    close(pickle.loads(pickle.dumps(layer))(x), layer(x))


@by_base
def test_hooks_on_what_is_fused_are_called(base):
    model = lora(llama(base))
    patched = twin(model)
    want = logits(patched)
    seen = []
    layer = patched.base_model.model.model.layers[0].mlp.up_proj
    for inner in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        handle = inner.register_forward_hook(lambda *args: seen.append(args[0]))
        close(logits(patched), want)
        assert seen.pop() is inner
        handle.remove()


def test_optimiser_and_trainer_state_are_the_same():
    model = lora(llama())
    patched = copy.deepcopy(model)
    losses = []
    for one in (model, patched):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
        if one is patched:
            fastlora.patch(one, show=False)
        losses.append([])
        for _ in range(5):
            losses[-1].append(step(one)[0].item())
            optimizer.step()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.1
