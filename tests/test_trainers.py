"""The Hugging Face Trainer and TRL's SFTTrainer on QLinear, through PEFT and without it."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft", minversion="0.20", reason="PEFT makes the adapters that are trained")
transformers = pytest.importorskip("transformers", minversion="5.20", reason="its Trainer is what is tested")
pytest.importorskip("accelerate", reason="the Trainer runs on it")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402

import fastlora  # noqa: E402
from fastlora import QLinear  # noqa: E402
from fastlora.integrations.peft_layer import LoraQLinear  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(32)]
DATA = [{"input_ids": row, "labels": row} for row in ROWS]
STEPS, SAVED = 6, 3


@pytest.fixture(autouse=True)
def one_thread(keep_threads):
    """Models are too small for more."""
    torch.set_num_threads(1)


def dense_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def lora(dropout=0.1):
    return LoraConfig(
        r=4, lora_alpha=32, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM"
    )


def make(kind, dropout=0.1):
    """Kinds are peft: PEFT over QLinear; own: QLinear's adapters; stock: PEFT over dense layers of the same
    values."""
    model = dense_model()
    fastlora.convert(model, rank=4 if kind == "own" else 0, alpha=32, dropout=dropout, progress=False)
    if kind == "stock":
        packed, model = model, dense_model()
        for name, layer in packed.named_modules():
            if isinstance(layer, QLinear):
                model.get_submodule(name).weight.data.copy_(layer.dequantize())
    torch.manual_seed(1)
    return model if kind == "own" else get_peft_model(model, lora(dropout))


def train(model, folder, resume=None, **kwargs):
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, save_steps=SAVED, logging_steps=1,
        seed=1, learning_rate=1e-2, use_cpu=True, report_to=[], disable_tqdm=True, **kwargs,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=DATA)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == STEPS
    return found


def adapters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def frozen(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Losses and adapter of an ordinary run, by kind."""
    runs = {kind: train(make(kind), tmp_path_factory.mktemp(kind)) for kind in ("peft", "own")}
    return {kind: (losses(one), adapters(one.model)) for kind, one in runs.items()}


CASES = [
    ("peft", {}),
    ("peft", {"bf16": True}),
    ("peft", {"gradient_accumulation_steps": 2}),
    ("own", {"gradient_accumulation_steps": 2}),
    *(
        (
            kind,
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
        )
        for kind in ("peft", "own")
        for reentrant in (False, True)
    ),
]


@pytest.mark.parametrize(("kind", "kwargs"), CASES, ids=str)
def test_resuming_is_not_having_stopped(kind, kwargs, plain, tmp_path):
    """The same losses and, bit for bit, the same adapter, with dropout; the base does not change. With
    activations checkpointed they are those of an ordinary run."""
    model = make(kind)
    before, base = adapters(model), frozen(model)
    whole = train(model, tmp_path / "whole", **kwargs)
    again = train(make(kind), tmp_path / "again", tmp_path / "whole" / f"checkpoint-{SAVED}", **kwargs)
    assert losses(again) == losses(whole)
    after = adapters(whole.model)
    assert same(adapters(again.model), after)
    assert same(frozen(again.model), base)
    assert same(frozen(whole.model), base)
    assert not any(torch.equal(after[name], before[name]) for name in after)
    if "gradient_checkpointing" in kwargs:
        assert losses(whole) == plain[kind][0]
        assert same(after, plain[kind][1])
    name = "adapter_model.safetensors" if kind == "peft" else "model.safetensors"
    last = [tmp_path / run / f"checkpoint-{STEPS}" / name for run in ("whole", "again")]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.parametrize("kwargs", [{}, {"bf16": True}], ids=str)
def test_losses_are_stock_peft_s(kwargs, tmp_path):
    ours, stock = (train(make(kind, dropout=0.0), tmp_path / kind, **kwargs) for kind in ("peft", "stock"))
    tolerance = 5e-3 if kwargs else 1e-4
    torch.testing.assert_close(losses(ours), losses(stock), rtol=tolerance, atol=0)
    assert losses(ours)[-1] != losses(ours)[0]


def test_the_saved_adapter_is_stock_peft_s(tmp_path):
    """On the dense model of what the packed weights mean, and on QLinear again."""
    trainer = train(make("peft"), tmp_path / "run")
    trainer.save_model(str(tmp_path / "adapter"))
    ids = torch.tensor(ROWS[:2])
    want = trainer.model.eval()(input_ids=ids).logits
    stock = make("stock").unload()
    onto_dense = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    torch.testing.assert_close(onto_dense(input_ids=ids).logits, want, rtol=1e-3, atol=1e-4)
    packed = dense_model()
    fastlora.convert(packed, rank=0, progress=False)
    onto_packed = PeftModel.from_pretrained(packed, tmp_path / "adapter").eval()
    assert torch.equal(onto_packed(input_ids=ids).logits, want)


def test_own_adapters_are_saved_in_peft_s_format(tmp_path):
    trainer = train(make("own"), tmp_path / "run")
    fastlora.save_adapter(trainer.model, tmp_path / "adapter")
    ids = torch.tensor(ROWS[:2])
    stock = PeftModel.from_pretrained(make("stock").unload(), tmp_path / "adapter").eval()
    want = trainer.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(stock(input_ids=ids).logits, want, rtol=1e-3, atol=1e-4)
    assert (
        json.loads(Path(tmp_path, "adapter", "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    )


def test_evaluation_between_steps(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, eval_steps=1, eval_strategy="steps", use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(make("peft"), arguments, train_dataset=DATA, eval_dataset=DATA[:4])
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 2
    first = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == first


# --- TRL -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers", reason="TRL wants a tokenizer")
    words = {chr(ord("!") + i): i for i in range(64)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="!"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="!", eos_token='"')


def sft(model, folder, tokenizer, resume=None, peft_config=None, **kwargs):
    trl = pytest.importorskip("trl", minversion="1.10", reason="its SFTTrainer is what is tested")
    datasets = pytest.importorskip("datasets", reason="TRL reads datasets")
    rows = datasets.Dataset.from_dict({"text": ["".join(chr(ord("!") + i) for i in row) for row in ROWS]})
    arguments = trl.SFTConfig(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, save_steps=SAVED, logging_steps=1,
        seed=1, learning_rate=1e-2, use_cpu=True, report_to=[], disable_tqdm=True, max_length=16,
        bf16=False, **kwargs,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_sft_trainer_makes_the_adapter_itself(tokenizer, tmp_path):
    def packed():
        model = dense_model()
        fastlora.convert(model, rank=0, progress=False)
        return model

    def run(folder, **kwargs):
        torch.manual_seed(1)
        return sft(packed(), folder, tokenizer, peft_config=copy.deepcopy(lora()), **kwargs)

    whole = run(tmp_path / "whole")
    layers = [m for m in whole.model.modules() if isinstance(m, LoraQLinear)]
    assert len(layers) == 14
    assert all(layer.unfused() is None for layer in layers)
    again = run(tmp_path / "again", resume=tmp_path / "whole" / f"checkpoint-{SAVED}")
    assert losses(again) == losses(whole)
    assert same(adapters(again.model), adapters(whole.model))
    whole.save_model(str(tmp_path / "adapter"))
    back = PeftModel.from_pretrained(packed(), tmp_path / "adapter").eval()
    ids = torch.tensor(ROWS[:2])
    assert torch.equal(back(input_ids=ids).logits, whole.model.eval()(input_ids=ids).logits)


def test_sft_losses_are_stock_peft_s(tokenizer, tmp_path):
    ours, stock = (sft(make(kind, 0.0), tmp_path / kind, tokenizer) for kind in ("peft", "stock"))
    torch.testing.assert_close(losses(ours), losses(stock), rtol=1e-4, atol=0)


def test_sft_trains_own_adapters(tokenizer, tmp_path):
    whole = sft(make("own"), tmp_path / "whole", tokenizer)
    again = sft(make("own"), tmp_path / "again", tokenizer, tmp_path / "whole" / f"checkpoint-{SAVED}")
    assert losses(again) == losses(whole)
    assert same(adapters(again.model), adapters(whole.model))


@pytest.fixture
def example(monkeypatch):
    """examples/sft_trainer.py; returns run(*arguments), its exit code."""
    for name in ("trl", "datasets"):
        pytest.importorskip(name, reason="the example is about it")
    folder = Path(__file__).resolve().parent.parent / "examples"
    monkeypatch.syspath_prepend(str(folder))
    import sft_trainer

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sft_trainer.py", *map(str, arguments)])
        return sft_trainer.main()

    return run


def test_example(example, tmp_path, capsys):
    assert example("--steps", 8, "--rank", 4, "--out", tmp_path) == 0
    assert capsys.readouterr().out.count("\nyes ") == 2
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names


def test_example_fails_when_nothing_is_learnt(example, tmp_path, capsys):
    assert example("--steps", 1, "--learning-rate", 0, "--out", tmp_path) == 1
    assert "NO  training lowered" in capsys.readouterr().out


def test_example_says_what_it_does(example, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        example("--help")
    assert ended.value.code == 0
    assert "--learning-rate" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected a folder that holds a Hugging Face model"):
        example("--model", tmp_path / "none")
