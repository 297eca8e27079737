"""Soft prompts and prefixes: PEFT's on 4-bit models, held to dense ones of the same values, and our own."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import hf_models  # noqa: E402
from peft import (  # noqa: E402
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from transformers import DynamicCache  # noqa: E402

import fastlora  # noqa: E402
from fastlora import QLinear  # noqa: E402
from fastlora.methods.prompt import Prefix, SoftPrompt  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
T = 5  # virtual tokens
CONFIGS = {
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=T),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=T),
    "prefix with projection": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=T, prefix_projection=True, encoder_hidden_size=24
    ),
    "p-tuning": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=T, encoder_hidden_size=24
    ),
}
FAMILIES = ("llama", "qwen2")
IDS = hf_models.ids()
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0  # padded on the left


def base(family, how="convert", folder=None, dtype=torch.float32):
    """A 4-bit model, made by convert or by transformers while loading."""
    if how == "convert":
        model = hf_models.make(family, dtype)
        fastlora.convert(model, rank=0, progress=False)
        return model.eval()
    if not folder.exists():
        hf_models.saved(family, folder, dtype)
    return hf_models.load(folder, dtype=dtype, quantization_config=fastlora.FastLoraConfig()).eval()


def dense_of(model, family):
    """The dense model of the values that are packed."""
    dense = hf_models.make(family)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, QLinear)]
    assert len(layers) == 14
    with torch.no_grad():
        for name, layer in layers:
            dense.get_submodule(name).weight.copy_(layer.dequantize())
    return dense


def step(model, **options):
    model.zero_grad()
    loss = model(input_ids=IDS, attention_mask=MASK, labels=IDS, **options).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=MASK).logits


def generated(model, **inputs):
    inputs = inputs or {"input_ids": IDS, "attention_mask": MASK}
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.eval().generate(**inputs, **options)[:, -5:]


def trained(model, steps=12, lr=3e-2):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        losses.append(step(model)[0])
        optimizer.step()
    return losses


# --- PEFT's methods on 4-bit models -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("how", ["convert", "loading"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_methods(family, how, kind, tmp_path):
    ours = base(family, how, tmp_path / "dense")
    packed = {n: p.clone() for n, p in ours.named_parameters()}
    theirs = dense_of(ours, family)
    models = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        models.append(get_peft_model(model, CONFIGS[kind]()).train())
    (loss, grads), (want_loss, want) = (step(model) for model in models)
    assert loss == pytest.approx(want_loss, rel=1e-6)
    assert grads.keys() == want.keys()
    assert all("prompt_encoder" in name for name in grads)
    for name, gradient in want.items():
        assert ((grads[name] - gradient).norm() / gradient.norm()).item() < 1e-5, name

    losses = trained(models[0])
    assert losses[-1] < losses[0] - 0.02
    assert {n: torch.equal(p, packed[n]) for n, p in ours.named_parameters()} == dict.fromkeys(packed, True)

    models[0].save_pretrained(tmp_path / "adapter")
    y, text = logits(models[0]), generated(models[0])
    again = PeftModel.from_pretrained(base(family, how, tmp_path / "dense"), tmp_path / "adapter")
    assert torch.equal(logits(again), y)
    assert torch.equal(generated(again), text)
    on_dense = PeftModel.from_pretrained(dense_of(ours, family), tmp_path / "adapter")
    torch.testing.assert_close(logits(on_dense), y, rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(on_dense), text)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_pefts_methods_in_bfloat16_after_its_preparation(kind):
    model = base("llama", dtype=torch.bfloat16)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    torch.manual_seed(1)
    losses = trained(get_peft_model(model, CONFIGS[kind]()))
    assert losses[-1] < losses[0] - 0.02


def test_a_prompt_under_gradient_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model = base("llama")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        grads.append(step(get_peft_model(model, CONFIGS["prompt"]()).train()))
    assert grads[0][0] == grads[1][0]
    for name, gradient in grads[0][1].items():
        assert torch.equal(grads[1][1][name], gradient)


# --- SoftPrompt -------------------------------------------------------------------------------------------


def test_where_a_prompt_starts():
    torch.manual_seed(0)
    prompt = SoftPrompt(500, 64)
    assert prompt.prompt_embeddings.std().item() == pytest.approx(0.02, rel=0.02)
    assert SoftPrompt(500, 64, init=1.0).prompt_embeddings.std().item() == pytest.approx(1, rel=0.02)
    words = torch.randn(3, 8, dtype=torch.bfloat16)
    prompt = SoftPrompt(5, 8, init=words)
    assert torch.equal(prompt.prompt_embeddings, words[[0, 1, 2, 0, 1]].float())
    assert torch.equal(SoftPrompt(2, 8, init=words).prompt_embeddings, words[:2].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_prompt_does_to_a_batch(dtype):
    torch.manual_seed(0)
    prompt = SoftPrompt(T, 8)
    x = torch.randn(2, 4, 8, dtype=dtype)
    mask, labels = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), torch.arange(8).reshape(2, 4)
    out = prompt(x, mask, labels)
    assert out["inputs_embeds"].dtype == dtype
    assert torch.equal(out["inputs_embeds"][:, T:], x)
    for row in out["inputs_embeds"]:
        assert torch.equal(row[:T], prompt.prompt_embeddings.to(dtype))
    assert out["attention_mask"].tolist() == [[1] * T + [0, 1, 1, 1], [1] * (T + 4)]
    assert out["labels"].tolist() == [[-100] * T + [0, 1, 2, 3], [-100] * T + [4, 5, 6, 7]]
    assert list(prompt(x)) == ["inputs_embeds"]


class Block(nn.Module):
    """Tokens that see each other, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = x + nn.functional.scaled_dot_product_attention(x, x, x)
        return x + self.down(torch.tanh(self.up(x)))


def test_a_prompt_on_a_model_of_plain_torch():
    """Of a model that is no transformers', its gradient is float64's on the values that are packed."""
    torch.manual_seed(0)
    block = Block()
    fastlora.convert(block, rank=0, progress=False)
    reference = Block()
    for name in ("up", "down"):
        layer = getattr(block, name)
        assert isinstance(layer, QLinear)
        getattr(reference, name).load_state_dict({"weight": layer.dequantize(), "bias": layer.bias})
    reference.double()
    x, dy = torch.randn(3, 4, 16), torch.randn(3, 4 + T, 16)
    ours, theirs = SoftPrompt(T, 16, 1.0), SoftPrompt(T, 16, 1.0).double()
    theirs.load_state_dict(ours.state_dict())
    block(ours(x)["inputs_embeds"]).backward(dy)
    reference(theirs(x.double())["inputs_embeds"]).backward(dy.double())
    want = theirs.prompt_embeddings.grad
    assert ((ours.prompt_embeddings.grad - want).norm() / want.norm()).item() < 1e-5


def test_a_soft_prompt_is_pefts(tmp_path):
    model = base("llama")
    wte = model.get_input_embeddings()
    torch.manual_seed(1)
    prompt = SoftPrompt(T, 64, init=wte(torch.tensor([5, 6, 7])))
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=1e-2)
    model.requires_grad_(False)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**prompt(wte(IDS), MASK, IDS)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    prompt.save(tmp_path / "ours", task_type="CAUSAL_LM", base_model="a/model")
    theirs = PeftModel.from_pretrained(base("llama"), tmp_path / "ours")
    assert theirs.peft_config["default"].base_model_name_or_path == "a/model"
    with torch.no_grad():
        y = model(**prompt(wte(IDS), MASK)).logits
    assert torch.equal(y, logits(theirs))
    assert torch.equal(generated(model, **prompt(wte(IDS), MASK)), generated(theirs))
    again = SoftPrompt.load(tmp_path / "ours")
    assert torch.equal(again.prompt_embeddings, prompt.prompt_embeddings)


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_a_prompt_that_peft_saved(kind, tmp_path):
    torch.manual_seed(1)
    theirs = get_peft_model(base("qwen2"), CONFIGS[kind]())
    theirs.save_pretrained(tmp_path)
    prompt, model = SoftPrompt.load(tmp_path), base("qwen2")
    with torch.no_grad():
        y = model(**prompt(model.get_input_embeddings()(IDS), MASK)).logits
    assert torch.equal(y, logits(theirs))


# --- Prefix -----------------------------------------------------------------------------------------------


def prefix_of(model, **options):
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Prefix(T, config.num_hidden_layers, config.num_key_value_heads, head_dim, **options)


def with_prefix(model, prefix, **options):
    cache = DynamicCache(prefix(len(IDS), model.dtype))
    return model(input_ids=IDS, attention_mask=prefix.extended(MASK), past_key_values=cache, **options)


@pytest.mark.parametrize("hidden", [None, 24])
def test_the_equation_of_a_prefix(hidden):
    """Of any attention that takes keys and values, in float64."""
    torch.manual_seed(0)
    prefix = Prefix(T, 2, 3, 8, hidden=hidden, std=1.0).double()
    q, k, v = (torch.randn(4, 3, n, 8, dtype=torch.float64) for n in (6, 7, 7))
    p_k, p_v = prefix(4)[1]
    got = nn.functional.scaled_dot_product_attention(q, torch.cat([p_k, k], 2), torch.cat([p_v, v], 2))
    flat = prefix.prompt_embeddings
    if hidden:
        first, second = prefix.mlp[0], prefix.mlp[2]
        assert first.weight.shape == (hidden, 24)
        flat = torch.tanh(flat @ first.weight.T + first.bias) @ second.weight.T + second.bias
    for head in range(3):
        columns = [flat[:, (2 + part) * 24 + 8 * head :][:, :8] for part in (0, 1)]  # of the second layer
        for row in range(4):
            keys, values = (torch.cat([p, t[row, head]]) for p, t in zip(columns, (k, v), strict=True))
            want = torch.softmax(q[row, head] @ keys.T / 8**0.5, -1) @ values
            torch.testing.assert_close(got[row, head], want)


def test_a_prefix_starts_small_or_from_real_words():
    torch.manual_seed(0)
    assert Prefix(500, 2, 2, 8).prompt_embeddings.std().item() == pytest.approx(0.02, rel=0.02)
    model = base("llama")
    cache = DynamicCache()
    words = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        model(input_ids=words, past_key_values=cache)
        prefix = Prefix.from_pairs(cache)
        rest = model(input_ids=IDS[:1], past_key_values=DynamicCache(prefix())).logits
        want = model(input_ids=torch.cat([words, IDS[:1]], 1)).logits[:, 5:]
    assert prefix.tokens == 5
    torch.testing.assert_close(rest, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [None, 24])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_is_pefts(family, hidden, tmp_path):
    model = base(family)
    torch.manual_seed(1)
    prefix = prefix_of(model, hidden=hidden, std=0.5)
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = with_prefix(model, prefix, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    with torch.no_grad():
        y = with_prefix(model, prefix).logits
        folded = prefix.folded()
        assert folded.mlp is None
        assert torch.equal(with_prefix(model, folded).logits, y)
    prefix.save(tmp_path, task_type="CAUSAL_LM")
    theirs = PeftModel.from_pretrained(base(family), tmp_path)
    assert torch.equal(logits(theirs), y)
    again = Prefix.load(tmp_path)
    assert torch.equal(again.prompt_embeddings, folded.prompt_embeddings)
    assert (again.num_layers, again.heads, again.head_dim) == (2, 2, 16)


@pytest.mark.parametrize("kind", ["prefix", "prefix with projection"])
def test_a_prefix_that_peft_saved(kind, tmp_path):
    torch.manual_seed(1)
    theirs = get_peft_model(base("qwen2"), CONFIGS[kind]())
    theirs.save_pretrained(tmp_path)
    want = get_peft_model_state_dict(theirs)["prompt_embeddings"]
    prefix, model = Prefix.load(tmp_path), base("qwen2")
    assert torch.equal(prefix.values(), want)
    with torch.no_grad():
        assert torch.equal(with_prefix(model, prefix).logits, logits(theirs))


def test_a_prefix_generates():
    model = base("llama")
    torch.manual_seed(1)
    prefix = prefix_of(model, std=1.0)
    got = generated(
        model,
        input_ids=IDS,
        attention_mask=prefix.extended(MASK),
        past_key_values=DynamicCache(prefix(len(IDS))),
    )
    ids, mask = IDS, MASK
    for i in range(5):  # anew for every token, in one piece
        with torch.no_grad():
            out = model(
                input_ids=ids,
                attention_mask=prefix.extended(mask),
                past_key_values=DynamicCache(prefix(len(ids))),
                position_ids=(prefix.extended(mask).cumsum(1) - 1).clamp(min=0)[:, T:],
            )
        assert torch.equal(out.logits[:, -1].argmax(-1), got[:, i])
        ids, mask = torch.cat([ids, got[:, i : i + 1]], 1), torch.cat([mask, mask[:, -1:]], 1)


# --- what is refused --------------------------------------------------------------------------------------


def test_refused_arguments():
    for sizes, message in (
        ((0, 8), "SoftPrompt: expected tokens as an int >= 1, got 0"),
        ((2, 8.0), "SoftPrompt: expected features as an int >= 1, got 8.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SoftPrompt(*sizes)
    for shape in ((3, 7), (8,), (0, 8)):
        with pytest.raises(ValueError, match=r"SoftPrompt: expected init of shape \(m >= 1, 8\), got"):
            SoftPrompt(2, 8, init=torch.zeros(shape))
    prompt, x = SoftPrompt(2, 8), torch.zeros(3, 4, 8)
    with pytest.raises(ValueError, match=r"embeddings of shape \(batch, length, 8\), got \(3, 4, 7\)"):
        prompt(x[..., :7])
    with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 4\), got \(3, 5\)"):
        prompt(x, torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"labels of shape \(3, 4\), got \(3, 3\)"):
        prompt(x, None, torch.ones(3, 3))
    with pytest.raises(ValueError, match="Prefix: expected heads as an int >= 1, got 0"):
        Prefix(2, 2, 0, 8)
    with pytest.raises(ValueError, match="Prefix: expected hidden as an int >= 1, got 0"):
        Prefix(2, 2, 2, 8, hidden=0)
    with pytest.raises(ValueError, match=r"expected keys and values of one shape .*, got \[\] \.\.\."):
        Prefix.from_pairs([])
    with pytest.raises(ValueError, match=r"expected keys and values of one shape .*, got \[\(2, 1, 3, 4\)"):
        Prefix.from_pairs([(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))])
    with pytest.raises(ValueError, match=r"attention_mask of shape \(batch, length\), got \(3,\)"):
        Prefix(2, 2, 2, 8).extended(torch.ones(3))


def test_refused_files(tmp_path):
    prompt, prefix = SoftPrompt(2, 8), Prefix(2, 2, 2, 8)
    prompt.save(tmp_path / "prompt")
    prefix.save(tmp_path / "prefix")
    with pytest.raises(ValueError, match=r"expected peft_type PREFIX_TUNING in .*, got 'PROMPT_TUNING'"):
        Prefix.load(tmp_path / "prompt")
    with pytest.raises(ValueError, match=r"PROMPT_TUNING or P_TUNING in .*, got 'PREFIX_TUNING'"):
        SoftPrompt.load(tmp_path / "prefix")
    with pytest.raises(
        FileNotFoundError, match=r"SoftPrompt.load: expected adapter_config.json in .*, got none"
    ):
        SoftPrompt.load(tmp_path)

    def changed(kind, **change):
        file = tmp_path / kind / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    changed("prefix", num_layers=3)
    with pytest.raises(ValueError, match=r"2 · num_layers 3 · token_dim 16 columns, of 2 heads, got 64"):
        Prefix.load(tmp_path / "prefix")
    changed("prompt", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"expected prompt_embeddings of 3 rows alone in .*, got \{'prompt"):
        SoftPrompt.load(tmp_path / "prompt")
    weights = tmp_path / "prompt" / "adapter_model.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"rows alone in .*, got \{'x': \(1,\)\}"):
        SoftPrompt.load(tmp_path / "prompt")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected adapter_model\.safetensors in"):
        SoftPrompt.load(tmp_path / "prompt")
    (tmp_path / "prompt" / "adapter_config.json").write_text("[")
    weights.touch()
    with pytest.raises(ValueError, match="expected a JSON object in"):
        SoftPrompt.load(tmp_path / "prompt")
