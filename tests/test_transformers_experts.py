"""transformers' mixture-of-experts models: QExperts against the stock modules, convert, files, loading."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import fastlora
from fastlora import QExperts, QLinear
from fastlora.integrations import experts as stacked

pytest.importorskip("transformers", "5.23", reason="transformers 5.23 or newer is not installed")
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**COMMON, intermediate_size=40, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **COMMON,
        intermediate_size=40,
        moe_intermediate_size=24,
        num_experts=6,
        head_dim=8,
        norm_topk_prob=True,
    ),
    "gpt_oss": lambda: GptOssConfig(**COMMON, intermediate_size=40, num_local_experts=4, head_dim=8),
}
NEMOTRON = {
    "n_routed_experts": 3,
    "moe_intermediate_size": 24,
    "mlp_hidden_act": "relu2",
    "moe_latent_size": None,
}


def make(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=dtype)
    for module in model.modules():
        if stacked.is_experts(module):
            for p in module.parameters():
                nn.init.normal_(p, std=0.2)
    return model.eval()


def convert(model, *args, **options):
    return fastlora.convert(model, *args, progress=False, **{"rank": 2, "alpha": 4} | options)


def experts_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QExperts)}


def draw_adapters(model):
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)


def with_dequantised_weights(dense, model):
    """`dense`, its weights made those that `model` has in NF4."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, QLinear):
                dense.get_submodule(name).weight.copy_(module.dequantize())
            elif isinstance(module, QExperts):
                for projection in module.shapes:
                    dense.get_parameter(f"{name}.{projection}").copy_(module.dequantize(projection))
    return dense


def assert_close(got, want, tolerance=1e-5):
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300)
    assert error <= tolerance, f"{error:.3g}"


# --- one module -------------------------------------------------------------------------------------------


def stock_experts(kind):
    if kind == "nemotron_h":
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        config = AutoConfig.for_model("nemotron_h", hidden_size=32, **NEMOTRON)
        config._experts_implementation = "eager"
        made = NemotronHExperts(config)
        for p in made.parameters():
            nn.init.normal_(p, std=0.2)
        return made
    return next(m for m in make(kind).modules() if stacked.is_experts(m))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", [*CONFIGS, "nemotron_h"])
def test_a_module_computes_what_the_stock_one_does(kind, implementation):
    """gpt_oss: transposed and interleaved weights, biases, a clamped gate; nemotron_h: no gate."""
    stock = stock_experts(kind)
    q = stacked.from_module(stock, rank=0)
    stock.config._experts_implementation = implementation
    for name in q.shapes:
        stock.get_parameter(name).data = q.dequantize(name)
    g = torch.Generator().manual_seed(2)
    weights, index = torch.rand(13, q.num_experts, generator=g).topk(2)
    x = torch.randn(13, 32, generator=g, requires_grad=True)
    weights.requires_grad_()
    learned = [x, weights]
    if kind == "gpt_oss":
        learned += [stock.gate_up_proj_bias, stock.down_proj_bias]
        assert q.gate_up_proj_bias is stock.gate_up_proj_bias
    results = []
    for module in (q, stock):
        y = module(x, index, weights)
        results.append([y, *torch.autograd.grad(y.square().sum(), learned)])
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


def test_activation_is_the_stock_modules_own_and_nobody_sees_the_module_itself():
    q = stacked.from_module(stock_experts("gpt_oss"), rank=0)
    x = torch.tensor([[9.0, 9.0, -9.0, -9.0]])
    want = (7.0 + 1) * 7.0 * torch.sigmoid(torch.tensor(1.702 * 7.0))
    assert torch.allclose(q.activation(x)[0, 0], want)
    assert [type(m).__name__ for m in q.modules()] == ["QExperts", "StockActivation"]
    assert "GptOssExperts's _apply_gate" in str(q)
    for p in q.parameters():  # and the dense weights are let go
        assert p.dim() < 3 or p.dtype == torch.uint8


# --- whole models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_models_loss_and_gradients(kind, dtype):
    """Against the stock model in float32 with the same weights, adapters merged into them: a merged weight's
    gradient gives the adapter's by the chain rule."""
    model = make(kind, dtype)
    report = convert(model)
    draw_adapters(model)
    dense = with_dequantised_weights(make(kind), model)
    merged = {}
    for name, q in experts_of(model).items():
        for projection in q.shapes:
            a, b = (p.detach().requires_grad_() for p in q.adapter(projection))
            w = dense.get_parameter(f"{name}.{projection}").detach() + q.scaling * b @ a
            experts = dense.get_submodule(name)
            del experts._parameters[projection]
            setattr(experts, projection, w)
            merged[f"{name}.{projection}"] = (a, b)
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            with torch.no_grad():
                dense.get_submodule(name).weight += module.scaling * module.lora_B @ module.lora_A
    for name, p in model.named_parameters():  # what was never quantised was rounded to dtype
        if name in dict(dense.named_parameters()) and p.is_floating_point():
            dense.get_parameter(name).data.copy_(p)
    ids = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(3))
    got, want = (m(input_ids=ids, labels=ids).loss for m in (model, dense))
    got.backward()
    want.backward()
    loose = dtype == torch.bfloat16
    assert_close(got, want, 1e-2 if loose else 1e-5)
    for name, (a, b) in merged.items():
        experts, _, projection = name.rpartition(".")
        for p, reference in zip(model.get_submodule(experts).adapter(projection), (a, b), strict=True):
            if not loose:  # a rounding moves tokens to other experts
                assert_close(p.grad, reference.grad, 1e-4)
            assert p.grad.isfinite().all()
    assert len(experts_of(model)) == 2
    assert {c.experts for c in report.converted if ".experts." in c.name} == {4 if kind == "mixtral" else 6}


def test_training_with_gradient_checkpointing():
    model = make("mixtral")
    convert(model, dropout=0.1)
    draw_adapters(model)
    model.train()
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(3))

    def gradients():
        torch.manual_seed(5)
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    want = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients()
    assert any("experts" in name for name in want)
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


def test_it_learns_and_generates():
    model = make("qwen3_moe")
    convert(model, expert_rank=1)
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    out = model.generate(ids[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, 7)


# --- convert ----------------------------------------------------------------------------------------------


def test_the_report_lists_each_projection_and_ranks_are_chosen_apart():
    model = make("mixtral")
    report = convert(model, rank=3, expert_rank=1)
    listed = {c.name: c for c in report.converted}
    up = listed["model.layers.1.mlp.experts.gate_up_proj"]
    assert (up.experts, up.out_features, up.in_features, up.rank) == (4, 80, 32, 1)
    assert up.bytes_before == 4 * 80 * 32 * 4
    q = model.model.layers[1].mlp.experts
    assert up.bytes_after == sum(
        p.nbytes for n, p in q.named_parameters() if n in stacked_names("gate_up_proj")
    )
    assert "4 x 80 x 32" in str(report)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert report.trainable == sum(model.get_parameter(name).numel() for name in learns)
    assert "model.layers.0.mlp.experts.down_proj_lora_B" in learns
    assert not any("gate.weight" in name for name in learns)
    assert report.total == sum(p.numel() for p in make("mixtral").parameters()) + report.trainable
    assert model.model.layers[0].self_attn.q_proj.rank == 3


def stacked_names(name):
    return {name, f"{name}_scales", f"{name}_nested"}


def test_targets_and_skips():
    model = make("mixtral")
    convert(model, ["layers.0.mlp.experts"])
    assert list(experts_of(model)) == ["model.layers.0.mlp.experts"]
    assert not any(isinstance(m, QLinear) for m in model.modules())
    report = convert(model)
    assert ("model.layers.0.mlp.experts", "already QExperts") in {(s.name, s.reason) for s in report.skipped}
    assert model.model.layers[0].mlp.experts.down_proj_lora_A.requires_grad
    model = make("mixtral")
    report = convert(model, skip_modules=["experts"])
    assert not experts_of(model)
    assert [s.reason for s in report.skipped] == ["in skip_modules (experts)"] * 2


def test_what_stays_and_why():
    reasons = {}

    def keep(name, change, kind="mixtral"):
        model = make(kind)
        change(model)
        skipped = convert(model).skipped
        reasons[name] = next(s.reason for s in skipped if s.name.endswith("layers.0.mlp.experts"))

    def experts(model):
        return model.model.layers[0].mlp.experts

    keep("hooks", lambda m: experts(m).register_forward_hook(lambda *a: None))
    keep("norm", lambda m: setattr(experts(m), "has_post_expert_norm", True))
    keep("dtype", lambda m: experts(m).double())
    keep("extra", lambda m: setattr(experts(m), "act_fn", nn.PReLU()))
    keep("shape", lambda m: setattr(experts(m), "down_proj", nn.Parameter(torch.zeros(4, 32, 41))))
    keep("dims", lambda m: setattr(experts(m), "down_proj", nn.Parameter(torch.zeros(4, 32))))
    keep("shared", lambda m: setattr(m.model, "other", nn.ParameterList([experts(m).down_proj])))

    def parametrise(model):
        nn.utils.parametrize.register_parametrization(experts(model), "down_proj", nn.Identity())

    keep("computed", parametrise)

    class LooseExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.zeros(2, 3, 4))

    keep("unknown", lambda m: setattr(m.model.layers[0].mlp, "experts", LooseExperts()))
    kind = "a MixtralExperts"
    assert reasons == {
        "hooks": "it has hooks, which a replacement would lose",
        "norm": f"{kind}, which normalises what each expert gives",
        "dtype": "its gate_up_proj is torch.float64, not float32, bfloat16 or float16",
        "extra": f"{kind} with other parameters or buffers than the experts' (act_fn.weight)",
        "shape": f"{kind} with projections of 80 x 32 and 32 x 41",
        "dims": "its down_proj has the shape (4, 32)",
        "shared": "its weight is also model.other's (ParameterList), which stays dense",
        "computed": "its down_proj is computed, not stored",
        "unknown": "a LooseExperts, which does not keep to transformers' use_experts_implementation",
    }


def test_a_weight_that_is_not_finite_is_named():
    model = make("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = torch.nan
    with pytest.raises(
        ValueError, match=r"^convert: model.layers.1.mlp.experts: .*index \(3, 4\), of down_proj's expert 2"
    ):
        convert(model)


def test_from_module_takes_experts_only():
    with pytest.raises(TypeError, match=r"^QExperts: expected experts that can be converted, got a Linear$"):
        stacked.from_module(nn.Linear(2, 2))
    stock = stock_experts("mixtral")
    stock.has_post_expert_norm = True
    with pytest.raises(TypeError, match="got a MixtralExperts, which normalises what each expert gives"):
        stacked.from_module(stock)


def test_rows_with_adapters_of_their_own_refuse_experts_that_have_one():
    model = make("mixtral")
    convert(model)
    with pytest.raises(
        RuntimeError, match=r"^adapters: expected experts without adapters of their own, .* got 2 layers"
    ):
        fastlora.adapters(model, ["default", None])
    model = make("mixtral")
    convert(model, expert_rank=0)
    with fastlora.adapters(model, ["default", None]):
        assert model(torch.zeros(2, 3, dtype=torch.long)).logits.isfinite().all()


# --- adapters' files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_that_we_saved_is_the_same_in_peft(kind, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = make(kind)
    convert(model, dropout=0.1)
    draw_adapters(model)
    for name, q in experts_of(model).items():
        if ".0." in name:
            q.set_alpha(7)
    fastlora.save_adapter(model, tmp_path)
    dense = with_dequantised_weights(make(kind), model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(dense, tmp_path)
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = wrapped(ids).logits
        model.eval()
        assert_close(model(ids).logits, want, 1e-4)
        base = make(kind)
        convert(base, expert_rank=0)
        assert (model(ids).logits - base(ids).logits).norm() > 1e-2 * want.norm()


def test_an_adapter_that_peft_saved_is_the_same_here(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = make("mixtral")
    convert(model, ["q_proj", "experts"], rank=3)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    wrapped = peft.get_peft_model(with_dequantised_weights(make("mixtral"), model), config)
    draw_adapters(wrapped)
    wrapped.save_pretrained(tmp_path)
    fastlora.load_adapter(model, tmp_path)
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert_close(model(ids).logits, wrapped(ids).logits, 1e-4)


def test_adapter_files_round_trip_and_errors(tmp_path):
    model = make("mixtral")
    convert(model, ["experts"])
    draw_adapters(model)
    fastlora.save_adapter(model, tmp_path / "all")
    other = make("mixtral")
    convert(other, ["experts"], alpha=9)
    fastlora.load_adapter(other, tmp_path / "all")
    for name, q in experts_of(model).items():
        for a, b in zip(q.adapter_parameters(), other.get_submodule(name).adapter_parameters(), strict=True):
            assert torch.equal(a, b)
        assert other.get_submodule(name).scaling == q.scaling

    before = {name: p.clone() for name, p in other.named_parameters()}
    bare = make("mixtral")
    convert(bare, ["experts"], expert_rank=0)
    with pytest.raises(ValueError, match="expected a model with QLinear layers of rank > 0"):
        fastlora.save_adapter(bare, tmp_path / "none")
    convert(bare, ["q_proj"])
    with pytest.raises(ValueError, match="to fit the model, got") as error:
        fastlora.load_adapter(bare, tmp_path / "all")
    assert "8 unexpected in the file" in str(error.value)
    config = tmp_path / "all" / "adapter_config.json"
    config.write_text(config.read_text().replace('"alpha_pattern": {}', '"alpha_pattern": {"down_proj": 3}'))
    with pytest.raises(
        ValueError, match=r"^load_adapter: expected one alpha for both projections of model\.layers\.0"
    ):
        fastlora.load_adapter(other, tmp_path / "all")
    for name, p in other.named_parameters():
        assert torch.equal(p, before[name])
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(CONFIGS["mixtral"]())
    convert(meta, ["experts"])
    with pytest.raises(RuntimeError, match="expected materialised layers, got 2 that are not"):
        fastlora.load_adapter(meta, tmp_path / "all")


def test_targets_are_whole_paths_where_the_last_name_says_too_much(tmp_path):
    model = make("mixtral")
    convert(model, ["layers.0.mlp.experts"])
    fastlora.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    path = "model.layers.0.mlp.experts"
    assert config["target_parameters"] == [f"{path}.gate_up_proj", f"{path}.down_proj"]
    assert config["target_modules"] == []


# --- for a loader -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_replaced_on_meta_then_filled_from_dense_tensors(kind):
    dense = make(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    replaced = stacked.replace_experts(model)
    assert replaced == {f"model.layers.{i}.mlp.experts": None for i in range(2)}
    assert all(p.is_meta for p in model.parameters())
    for key, t in dense.state_dict().items():
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, QExperts) and name in module.shapes:
            assert t.shape == module.dense_shape(name)
            parts = module.quantize(name, t)
            assert set(parts) == stacked_names(name)
            for part, codes in parts.items():
                assert codes.shape == module.get_parameter(part).shape
                setattr(module, part, nn.Parameter(codes, requires_grad=False))
        else:
            module._parameters[name] = nn.Parameter(t) if name in module._parameters else None
    want = copy.deepcopy(dense)
    stacked.replace_experts(want)
    for key, t in want.state_dict().items():
        if not key.endswith("inv_freq"):
            assert torch.equal(model.state_dict()[key], t), key


def test_replace_respects_skips_and_shared_modules():
    model = make("mixtral")
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    stacked.replace_experts(model, rank=2)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert first is second
    assert first.rank == 2
    model = make("mixtral")
    found = stacked.replace_experts(model, skip_modules="layers.1")
    assert found == {
        "model.layers.0.mlp.experts": None,
        "model.layers.1.mlp.experts": "in skip_modules (layers.1)",
    }
    assert list(experts_of(model)) == ["model.layers.0.mlp.experts"]
    assert stacked.replace_experts(model)["model.layers.0.mlp.experts"] == "already QExperts"


def test_saving_by_transformers_keeps_the_bits(tmp_path):
    """save_pretrained undoes what loading did to the checkpoint's tensors: it cuts the stacks by experts and
    rows, and packed ones can be cut so. Whatever the names, every byte must be there."""
    from safetensors.torch import load_file

    model = make("mixtral")
    convert(model, ["experts"], rank=0)
    model.save_pretrained(tmp_path, save_original_format=False)
    saved = load_file(tmp_path / "model.safetensors")
    for key, t in model.state_dict().items():
        assert torch.equal(saved[key], t)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    q = model.model.layers[0].mlp.experts
    cut = [saved[f"model.layers.0.block_sparse_moe.experts.2.w{i}.weight"] for i in (1, 3)]
    assert torch.equal(torch.cat(cut), q.gate_up_proj[2])
