"""fastlora.patch under torch.compile: one graph, the same numbers, and no graph that outlives its weights."""

import pytest
import torch
from needs import traces_bitsandbytes, traces_peft
from peft_models import BASES, IDS, Pair, added, drawn, llama, lora, twin

import fastlora

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
by_base = pytest.mark.parametrize("base", BASES)


@pytest.fixture(autouse=True)
def _fresh(keep_threads):
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def loss(model):
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    return model(x).square().mean()


def gradients(model, value):
    return torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


@by_base
@traces_peft
def test_a_training_model_is_one_graph(base):
    model = twin(lora(Pair(base), lora_bias=True, bias="all"))
    want = loss(model)
    got = loss(compiled(model))
    torch.testing.assert_close(got, want, **CLOSE)
    for one, other in zip(gradients(model, got), gradients(model, want), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@traces_peft
def test_a_transformer_is_one_graph():
    model = twin(lora(llama())).eval()
    with torch.no_grad():
        got = compiled(model)(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(got, model(input_ids=IDS, use_cache=False).logits, **CLOSE)


@traces_peft
def test_several_adapters_and_dropout_trace():
    model = lora(Pair("bitsandbytes"), lora_dropout=0.3)
    added(model, "other", 2, r=6, lora_dropout=0.1, target_modules=["up_proj"])
    model = twin(model)
    torch.manual_seed(0)
    assert loss(compiled(model)).isfinite()
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    torch.testing.assert_close(loss(compiled(model)), loss(model), **CLOSE)


@pytest.mark.parametrize("base", [pytest.param("bitsandbytes", marks=traces_bitsandbytes), "dense"])
def test_a_layer_routes_a_mixed_batch_in_a_graph(base):
    model = lora(Pair(base))
    added(model, "other", 2, r=6, target_modules=["up_proj"])
    layer = twin(model).eval().base_model.model.up_proj
    x = torch.randn(3, 5, 64)
    names = ["other", "__base__", "default"]
    got = compiled(layer)(x, adapter_names=names)
    torch.testing.assert_close(got, layer(x, adapter_names=names), **CLOSE)


@traces_bitsandbytes
def test_a_merge_reaches_a_compiled_layer():
    layer = twin(lora(Pair("bitsandbytes"))).base_model.model.up_proj
    run = compiled(layer)
    x = torch.randn(5, 64)
    before = run(x)
    layer.merge()
    torch.testing.assert_close(run(x), layer(x), **CLOSE)
    layer.unmerge()
    torch.testing.assert_close(run(x), layer(x), **CLOSE)
    assert (run(x) - before).norm() < 0.2 * before.norm()


@pytest.mark.parametrize("base", ["bitsandbytes", "dense"])
@traces_peft
def test_other_values_compile_nothing_anew(base, tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    other = lora(Pair(base), seed=5, r=2, lora_alpha=3)
    other.save_pretrained(tmp_path)
    model = lora(Pair(base))
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    fastlora.patch(model, show=False)
    model.eval()
    with torch.no_grad():
        want = loss(other)
        run = compiled(model)
        before = loss(run)
        with torch._dynamo.config.patch(error_on_recompile=True):
            hotswap_adapter(model, tmp_path, adapter_name="default")
            torch.testing.assert_close(loss(run), want, **CLOSE)
            drawn(model, "default", 8)
            assert (loss(run) - want).abs() > 1e-5
    assert (before - want).abs() > 1e-5
