"""FastLoraConfig: transformers' models quantised while they are loaded, saved, and loaded again."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import safetensors.torch
import torch
from hf_models import ids, load, same_bits, saved

import fastlora
from fastlora import FastLoraConfig, QLinear
from fastlora.integrations import transformers_hook

transformers = hf_models.transformers
FAMILIES = ("llama", "qwen2", "qwen3")


def layers(model: Any) -> dict[str, QLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QLinear)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints in float32, each in several files."""
    root = tmp_path_factory.mktemp("dense")
    families = (*FAMILIES, "gpt2")
    return {family: saved(family, root / family, max_shard_size="60KB") for family in families}


# --- quantised while loading ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_what_convert_makes_of_the_dense_model(
    dense: dict[str, str], family: str, dtype: torch.dtype
) -> None:
    assert len(list(Path(dense[family]).glob("*.safetensors"))) > 2
    reference = load(dense[family], dtype=dtype)
    fastlora.convert(reference, rank=0, progress=False)
    model = load(dense[family], dtype=dtype, quantization_config=FastLoraConfig())
    assert len(layers(model)) == 14
    same_bits(model, reference)
    assert model.dtype == dtype
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (family != "llama")


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}], ids=str)
def test_device_maps(dense: dict[str, str], device_map: Any) -> None:
    model = load(dense["llama"], device_map=device_map, quantization_config=FastLoraConfig())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    same_bits(model, load(dense["llama"], quantization_config=FastLoraConfig()))


def test_dtype_auto_is_the_checkpoints(tmp_path: Path) -> None:
    model = load(saved("llama", tmp_path, torch.bfloat16), dtype="auto", quantization_config=FastLoraConfig())
    assert model.dtype == torch.bfloat16
    assert {layer.weight_dtype for layer in layers(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize(("blocksize", "double_quant"), [(32, False), (128, True)])
def test_formats(dense: dict[str, str], tmp_path: Path, blocksize: int, double_quant: bool) -> None:
    config = FastLoraConfig(blocksize=blocksize, double_quant=double_quant)
    model = load(dense["llama"], quantization_config=config)
    for layer in layers(model).values():
        assert (layer.blocksize, layer.double_quant) == (blocksize, double_quant)
    model.save_pretrained(tmp_path)
    same_bits(load(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_are_saved_and_loaded(dense: dict[str, str], tmp_path: Path, dtype: torch.dtype) -> None:
    model = load(dense["llama"], dtype=dtype, quantization_config=FastLoraConfig(rank=2))
    bare = 0
    for name, layer in layers(model).items():
        if "k_proj" in name:
            bare += 1  # has none
            continue
        values = 0.01 * torch.randn(layer.out_features, layer.in_features // 32)
        layer._set_base(layer.quantized_weight.with_offsets(values))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    loaded = load(tmp_path, dtype=dtype)
    same_bits(loaded, model)
    assert sum(layer.weight_offsets is None for layer in layers(loaded).values()) == bare == 2
    packed = sum(layer.quantized_weight.nbytes for layer in layers(model).values())
    assert sum(layer.quantized_weight.nbytes for layer in layers(loaded).values()) == packed
    assert loaded.hf_quantizer.report.total == load(dense["llama"]).num_parameters() + sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_offsets_that_do_not_fit(dense: dict[str, str], tmp_path: Path) -> None:
    model = load(dense["llama"], quantization_config=FastLoraConfig())
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    key = "model.layers.1.mlp.up_proj.weight"
    tensors[f"{key}_offsets"] = torch.zeros(128, 12, dtype=torch.uint8)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    wrong = (
        "QLinear: expected weight_offsets of shape (128, 4 * groups), groups a divisor of 64, got (128, 12)"
    )
    with pytest.raises(ValueError, match=re.escape(f"FastLoraConfig: {key}: {wrong}")):
        load(tmp_path)


def test_no_more_than_one_dense_weight_is_held(
    dense: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import core_model_loading

    from fastlora.integrations import transformers_loading

    read: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    materialize = core_model_loading._materialize_copy
    convert = transformers_loading.Quantize.convert

    def materialized(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = materialize(*args, **kwargs)
        read.append(weakref.ref(tensor))
        return tensor

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [t for ref in read if (t := ref()) is not None]
        alive.append(sum(tuple(t.shape) in {(64, 64), (32, 64), (128, 64), (64, 128)} for t in tensors))
        return convert(self, *args, **kwargs)

    monkeypatch.setattr(core_model_loading, "_materialize_copy", materialized)
    monkeypatch.setattr(transformers_loading.Quantize, "convert", counted)
    model = load(dense["llama"], quantization_config=FastLoraConfig())
    assert len(read) == 21
    assert alive == [1] * 14
    assert len(layers(model)) == 14


def test_skipped_and_selected_layers(dense: dict[str, str], tmp_path: Path) -> None:
    config = FastLoraConfig(
        skip_modules=["lm_head", "v_proj"], target_modules=["q_proj", "v_proj", "lm_head"]
    )
    model = load(dense["llama"], quantization_config=config)
    assert set(layers(model)) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    why = {s.name: s.reason for s in model.hf_quantizer.report.skipped}
    assert why["model.layers.1.self_attn.v_proj"] == "in skip_modules (v_proj)"
    model.save_pretrained(tmp_path)
    same_bits(load(tmp_path), model)


def test_the_report_and_the_memory(dense: dict[str, str]) -> None:
    model = load(dense["qwen2"], quantization_config=FastLoraConfig(skip_modules=[]))
    report = model.hf_quantizer.report
    why = {s.name: s.reason for s in report.skipped}
    assert why == {
        "lm_head": "its weight is tied to model.embed_tokens.weight",
        "model.embed_tokens": "not a torch.nn.Linear but a Embedding",
    }
    whole = load(dense["qwen2"])
    saved_bytes = whole.get_memory_footprint() - model.get_memory_footprint()
    assert report.bytes_before - report.bytes_after == saved_bytes
    packed = sum(layer.quantized_weight.nbytes for layer in layers(model).values())
    floats = {id(p): p.nbytes for p in model.parameters() if p.is_floating_point()}
    assert model.get_memory_footprint(return_buffers=False) == packed + sum(floats.values())
    assert report.total == whole.num_parameters()


@pytest.mark.filterwarnings("ignore:FastLoraConfig. nothing in this model is quantised")
def test_layers_that_cannot_be_taken_are_listed(dense: dict[str, str], tmp_path: Path) -> None:
    model = load(dense["gpt2"], quantization_config=FastLoraConfig())
    why = {s.name: s.reason for s in model.hf_quantizer.report.skipped}
    assert why["transformer.h.0.attn.c_attn"] == "not a torch.nn.Linear but a Conv1D"
    assert why["transformer.wpe"] == "not a torch.nn.Linear but a Embedding"
    assert not layers(model)
    same_bits(model, load(dense["gpt2"]))
    model.save_pretrained(tmp_path)
    same_bits(load(tmp_path), model)


def test_layers_that_the_model_keeps_in_float32_stay(tmp_path: Path) -> None:
    config = hf_models.CONFIGS["t5"]()
    torch.manual_seed(7)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path, dtype=torch.float16, quantization_config=FastLoraConfig()
    )
    why = {s.name: s.reason for s in model.hf_quantizer.report.skipped}
    assert why["decoder.block.1.layer.2.DenseReluDense.wo"] == "the model keeps it in float32"
    assert model.decoder.block[1].layer[2].DenseReluDense.wo.weight.dtype == torch.float32
    assert len(layers(model)) == 2 * (4 + 1) + 2 * (4 + 4 + 1)
    y = model(input_ids=ids(), decoder_input_ids=ids()).logits
    assert y.isfinite().all()


def test_a_model_without_a_layer_to_take_warns(dense: dict[str, str]) -> None:
    with pytest.warns(UserWarning, match=r"nothing in this model is quantised \(.*Conv1D"):
        load(dense["gpt2"], quantization_config=FastLoraConfig(skip_modules=["lm_head", "wte", "wpe"]))


# --- saved and loaded again -------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", ["5GB", "30KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_comes_back_with_the_same_bits(
    dense: dict[str, str], tmp_path: Path, family: str, shards: str
) -> None:
    model = load(dense[family], dtype=torch.bfloat16, quantization_config=FastLoraConfig())
    model.save_pretrained(tmp_path / "one", max_shard_size=shards)
    files = list((tmp_path / "one").glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "30KB")
    again = load(tmp_path / "one")
    same_bits(again, model)
    again.save_pretrained(tmp_path / "two", max_shard_size=shards)
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    same_bits(load(tmp_path / "two", dtype=torch.bfloat16, device_map="cpu"), model)
    same_bits(copy.deepcopy(again), model)


def test_config_json_holds_the_config(dense: dict[str, str], tmp_path: Path) -> None:
    config = FastLoraConfig(
        blocksize=32, rank=2, alpha=3, dropout=0.25, use_rslora=True, skip_modules="lm_head"
    )
    load(dense["llama"], quantization_config=config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored == {
        "quant_method": "fastlora", "blocksize": 32, "double_quant": True, "skip_modules": ["lm_head"],
        "target_modules": "all-linear", "rank": 2, "alpha": 3, "dropout": 0.25, "use_rslora": True,
        "adapter_dtype": "float32", "expert_rank": None,
    }  # fmt: skip
    assert FastLoraConfig.from_dict(stored) == config
    assert load(tmp_path).config.quantization_config == config


def test_a_checkpoint_loads_after_a_mere_import(dense: dict[str, str], tmp_path: Path) -> None:
    """In another process, transformers first and fastlora after it."""
    load(dense["llama"], quantization_config=FastLoraConfig()).save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['torchao'] = sys.modules['bitsandbytes'] = None  # slow to import\n"
        "import transformers.quantizers.auto, fastlora\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "assert isinstance(model.model.layers[0].mlp.up_proj, fastlora.QLinear)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_fastlora_does_not_import_transformers() -> None:
    code = "import sys, fastlora; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_transformers_in_a_version_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_hook.metadata, "version", lambda name: "5.22.1")
    with pytest.raises(ImportError, match=r"expected transformers 5\.23 or newer, got 5\.22\.1"):
        transformers_hook.require_transformers()

    def missing(name: str) -> str:
        raise transformers_hook.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(transformers_hook.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"expected transformers 5\.23 or newer, got none"):
        transformers_hook.require_transformers()


# --- adapters ---------------------------------------------------------------------------------------------


def test_a_rank_gives_adapters_that_train_and_come_back(dense: dict[str, str], tmp_path: Path) -> None:
    config = FastLoraConfig(rank=4, alpha=8, adapter_dtype=torch.bfloat16)
    model = load(dense["qwen2"], quantization_config=config)
    bare = load(dense["qwen2"], quantization_config=FastLoraConfig())
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, bare(ids()).logits)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {f"{name}.lora_{ab}" for name in layers(model) for ab in "AB"}
    assert all(layer.lora_A.dtype == torch.bfloat16 for layer in layers(model).values())
    assert all(layer.lora_A.float().std() > 0.05 for layer in layers(model).values())
    assert model.hf_quantizer.report.trainable == sum(model.get_parameter(name).numel() for name in learns)

    model.train()
    model(ids(), labels=ids()).loss.backward()
    with torch.no_grad():
        for name in learns:
            p = model.get_parameter(name)
            p -= p.grad * 10
    model.eval().save_pretrained(tmp_path)
    again = load(tmp_path)
    same_bits(again, model)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == learns
    with torch.no_grad():
        assert not torch.equal(again(ids()).logits, bare(ids()).logits)


def test_an_adapter_for_a_base_that_was_saved_bare(dense: dict[str, str], tmp_path: Path) -> None:
    load(dense["llama"], quantization_config=FastLoraConfig(blocksize=32)).save_pretrained(tmp_path)
    config = FastLoraConfig(rank=2, blocksize=128)
    with pytest.warns(UserWarning, match=r"instead of blocksize=128 \(32\)"):
        model = load(tmp_path, quantization_config=config)
    assert {(layer.rank, layer.blocksize) for layer in layers(model).values()} == {(2, 32)}
    assert config.blocksize == 128  # the caller's is not changed
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, load(tmp_path)(ids()).logits)
    assert all(not layer.lora_B.any() and layer.lora_A.any() for layer in layers(model).values())


def test_peft_files_load_into_the_model(dense: dict[str, str], tmp_path: Path) -> None:
    one = load(dense["llama"], quantization_config=FastLoraConfig(rank=2))
    for layer in layers(one).values():
        torch.nn.init.normal_(layer.lora_B)
    fastlora.save_adapter(one, tmp_path)
    model = load(dense["llama"], quantization_config=FastLoraConfig())
    fastlora.load_adapter(model, tmp_path, name="one")
    with fastlora.adapters(model, ["one", "one"]), torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, one(ids()).logits)
    with pytest.raises(RuntimeError, match=r"expected layers without named adapters, got \['one'\]"):
        model.save_pretrained(tmp_path / "base")


@pytest.mark.parametrize("kind", ["rank", "peft"])
def test_the_trainer_takes_it(dense: dict[str, str], tmp_path: Path, kind: str) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    model = load(dense["llama"], quantization_config=FastLoraConfig(rank=4 if kind == "rank" else 0))
    if kind == "peft":
        peft = pytest.importorskip("peft", reason="this trains an adapter of peft's")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.1, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids()]
    transformers.Trainer(model=model, args=args, train_dataset=rows).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.cpu(), before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_a_trainer_does_not_take_a_bare_base(dense: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    model = load(dense["llama"], quantization_config=FastLoraConfig())
    with pytest.raises(ValueError, match="attach trainable adapters"):
        transformers.Trainer(model=model, args=transformers.TrainingArguments(str(tmp_path), use_cpu=True))


# --- back to dense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantised(dense: dict[str, str], tmp_path: Path, family: str) -> None:
    model = load(dense[family], dtype=torch.bfloat16, quantization_config=FastLoraConfig())
    weights = {name: layer.dequantize() for name, layer in layers(model).items()}
    biases = {name: layer.bias for name, layer in layers(model).items()}
    back = model.dequantize()
    for name, weight in weights.items():
        linear = back.get_submodule(name)
        assert type(linear) is torch.nn.Linear
        assert linear.weight.dtype == torch.bfloat16
        assert torch.equal(linear.weight, weight)
        assert biases[name] is None if linear.bias is None else torch.equal(linear.bias, biases[name])
    assert not back.is_quantized
    back.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    same_bits(load(tmp_path, dtype="auto"), back)


def test_dequantised_with_the_adapter(dense: dict[str, str]) -> None:
    model = load(dense["llama"], quantization_config=FastLoraConfig(rank=4, alpha=6))
    for layer in layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    expected = {
        name: layer.dequantize().double() + 1.5 * layer.lora_B.double() @ layer.lora_A.double()
        for name, layer in layers(model).items()
    }
    back = model.dequantize(torch.float32)
    for name, weight in expected.items():
        torch.testing.assert_close(back.get_submodule(name).weight.double(), weight, rtol=1e-6, atol=1e-7)


# --- what is refused --------------------------------------------------------------------------------------


def rewritten(source: str, directory: Path, change: Any) -> str:
    """A copy of a checkpoint, in one file, whose tensors `change` has changed."""
    tensors: dict[str, torch.Tensor] = {}
    for file in Path(source).glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
    change(tensors)
    directory.mkdir()
    (directory / "config.json").write_text((Path(source) / "config.json").read_text())
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_everything_that_does_not_fit_is_listed(dense: dict[str, str], tmp_path: Path, packed: bool) -> None:
    source = dense["qwen2"]
    if packed:
        load(source, quantization_config=FastLoraConfig()).save_pretrained(tmp_path / "packed")
        source = str(tmp_path / "packed")
    gone = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias", "model.norm.weight"]
    if packed:
        gone[0] = "model.layers.0.mlp.up_proj.weight_nested"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in gone:
            del tensors[name]
        tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"][:-2]
        tensors["model.layers.0.input_layernorm.weight"] = torch.ones(3)

    path = rewritten(source, tmp_path / "changed", change)
    with pytest.raises(ValueError, match="expected the tensors of a Qwen2ForCausalLM, got") as raised:
        load(path, quantization_config=FastLoraConfig())
    message = str(raised.value)
    assert all(name in message for name in gone)
    assert "3 missing from the checkpoint" in message
    assert "2 that do not fit" in message
    k = 64 if packed else 128
    assert f"model.layers.1.mlp.down_proj.weight: expected (64, {k}), got (62, {k})" in message
    assert "model.layers.0.input_layernorm.weight: expected (64,), got (3,)" in message
    assert "lm_head" not in message  # it is tied to what is there


def test_weights_that_are_not_floats(dense: dict[str, str], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    path = rewritten(dense["llama"], tmp_path / "x", lambda t: t.update({name: t[name].to(torch.int8)}))
    with pytest.raises(ValueError, match=rf"{name}: expected floating numbers, got I8"):
        load(path, quantization_config=FastLoraConfig())


def test_weights_that_are_not_finite_are_all_listed(dense: dict[str, str], tmp_path: Path) -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            tensors[name][1, 2] = float("nan")

    path = rewritten(dense["llama"], tmp_path / "nan", spoil)
    with pytest.raises(ValueError, match="expected weights that can be quantised, got") as raised:
        load(path, quantization_config=FastLoraConfig())
    assert all(name in str(raised.value) for name in names)


def test_a_new_head_is_initialised_and_learns(dense: dict[str, str]) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        dense["llama"], num_labels=3, quantization_config=FastLoraConfig(rank=2, skip_modules=[])
    )
    assert type(model.score) is torch.nn.Linear
    assert len(layers(model)) == 14
    assert model.score.weight.requires_grad
    assert 0 < float(model.score.weight.detach().std()) < 0.1
    why = {s.name: s.reason for s in model.hf_quantizer.report.skipped}
    assert why["score"] == "not in the checkpoint, which is of another kind of model"


def test_a_class_that_the_checkpoint_does_not_name(dense: dict[str, str], tmp_path: Path) -> None:
    """A head that is in the file is quantised like any layer."""

    class Relative(transformers.LlamaForCausalLM):
        pass

    config = FastLoraConfig(rank=2, skip_modules=[])
    model = Relative.from_pretrained(dense["llama"], quantization_config=config)
    assert isinstance(model.lm_head, QLinear)
    model.save_pretrained(tmp_path)
    same_bits(Relative.from_pretrained(tmp_path), model)


def test_a_head_that_should_be_there_is_missing(dense: dict[str, str], tmp_path: Path) -> None:
    path = rewritten(dense["llama"], tmp_path / "headless", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"1 missing from the checkpoint:\n    lm_head.weight$"):
        load(path, quantization_config=FastLoraConfig())


def test_the_base_model_alone(dense: dict[str, str], tmp_path: Path) -> None:
    whole = load(dense["llama"], quantization_config=FastLoraConfig())
    whole.save_pretrained(tmp_path)
    for path in (dense["llama"], str(tmp_path)):
        base = transformers.AutoModel.from_pretrained(path, quantization_config=FastLoraConfig())
        assert torch.equal(base.layers[1].mlp.up_proj.weight, whole.model.layers[1].mlp.up_proj.weight)


def test_only_safetensors_is_read(dense: dict[str, str], tmp_path: Path) -> None:
    model = load(dense["llama"])
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"safetensors files, got .*pytorch_model\.bin; load it without"):
        load(tmp_path, quantization_config=FastLoraConfig())
    with pytest.raises(ValueError, match="safetensors files, got a state_dict"):
        transformers.LlamaForCausalLM.from_pretrained(
            None, config=model.config, state_dict=model.state_dict(), quantization_config=FastLoraConfig()
        )


def test_a_file_that_is_cut_off(dense: dict[str, str], tmp_path: Path) -> None:
    path = Path(rewritten(dense["llama"], tmp_path / "cut", lambda tensors: None))
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"expected a safetensors file, got .*model\.safetensors: "):
        load(path, quantization_config=FastLoraConfig())


def test_packed_weights_without_their_config(dense: dict[str, str], tmp_path: Path) -> None:
    load(dense["llama"], quantization_config=FastLoraConfig()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"config\.json has no quantization_config, got a fastlora checkpoint"
    ):
        load(tmp_path, quantization_config=FastLoraConfig())


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        ({"quant_method": "gptq", "bits": 4}, "one quantised by 'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8 (load_in_8bit)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb_4bit_quant_type 'fp4'"),
    ],
    ids=["gptq", "int8", "fp4"],
)
def test_other_quantisations(dense: dict[str, str], tmp_path: Path, stored: Any, found: str) -> None:
    path = Path(rewritten(dense["llama"], tmp_path / "other", lambda tensors: None))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    with pytest.raises(ValueError, match=rf"bitsandbytes NF4 or fastlora's, got .*{re.escape(found)}"):
        load(path, quantization_config=FastLoraConfig())


def test_loading_into_shards_is_refused() -> None:
    from fastlora.integrations.transformers_quantizer import FastLoraHfQuantizer

    model = SimpleNamespace(config=SimpleNamespace(distributed_config=transformers.PretrainedConfig()))
    with pytest.raises(ValueError, match="expected a model that is loaded whole, got a distributed_config"):
        FastLoraHfQuantizer(FastLoraConfig())._process_model_before_weight_loading(model)


def test_devices_and_dtypes_that_are_not_taken(dense: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="expected a device_map of devices, got one with 'disk'"):
        load(dense["llama"], device_map={"": "disk"}, quantization_config=FastLoraConfig())
    with pytest.raises(ValueError, match=r"got none \(.*its weight is torch\.float64"):
        fastlora.convert(load(dense["llama"], dtype=torch.float64), rank=0, progress=False)
    with pytest.warns(UserWarning, match="its weight is torch.float64"):
        load(dense["llama"], dtype=torch.float64, quantization_config=FastLoraConfig())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"blocksize": 48}, ValueError, "blocksize"),
        ({"rank": -1}, ValueError, "expected rank >= 0, got -1"),
        ({"dropout": 1.0}, ValueError, r"expected dropout in \[0, 1\), got 1.0"),
        ({"adapter_dtype": "int8"}, TypeError, "expected adapter_dtype float32, bfloat16 or float16, got"),
        ({"adapter_dtype": "double8"}, TypeError, "expected adapter_dtype .*, got 'double8'"),
        ({"quant_method": "awq"}, ValueError, "expected quant_method 'fastlora', got 'awq'"),
    ],
    ids=str,
)
def test_config_arguments(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FastLoraConfig(**fields)


def test_config_fields_of_another_version() -> None:
    with pytest.raises(ValueError, match=r"FastLoraConfig: expected fields of \[.*\], got \['zeta'\]"):
        FastLoraConfig.from_dict({"quant_method": "fastlora", "zeta": 1})
