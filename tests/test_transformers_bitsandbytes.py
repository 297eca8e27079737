"""Checkpoints that transformers wrote with bitsandbytes' NF4, loaded into QLinear."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_models
import pytest
import safetensors.torch
import torch
from hf_models import load, same_bits, saved

from fastlora import FastLoraConfig, NF4Weight, QLinear

transformers = hf_models.transformers
bnb = pytest.importorskip("bitsandbytes", reason="writes the checkpoints that are read here")
pytest.importorskip("accelerate", reason="transformers needs it to write bitsandbytes' checkpoints")

KINDS = {"plain": {}, "double": {"bnb_4bit_use_double_quant": True}}
KINDS |= {
    f"{name}-bf16": options | {"bnb_4bit_quant_storage": torch.bfloat16} for name, options in KINDS.items()
}
LAYERS = 14


def quantised(source: str, **options: Any) -> Any:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **({"bnb_4bit_quant_type": "nf4"} | options))
    return load(source, dtype=torch.bfloat16, quantization_config=config)


def layers(model: Any) -> dict[str, QLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QLinear)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved("qwen2", tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def checkpoints(dense: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Any]]:
    """Of each kind, the path, in several files, and {layer: bitsandbytes' dequantised weight and bias}."""
    made = {}
    for kind, options in KINDS.items():
        model = quantised(dense, **options)
        path = tmp_path_factory.mktemp(kind)
        model.save_pretrained(path, max_shard_size="40KB")
        values = {
            name: (bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state).clone(), m.bias)
            for name, m in model.named_modules()
            if isinstance(m, bnb.nn.Linear4bit)
        }
        made[kind] = (str(path), values)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_bitsandbytes_own(
    checkpoints: dict[str, tuple[str, Any]], tmp_path: Path, kind: str
) -> None:
    path, values = checkpoints[kind]
    assert len(list(Path(path).glob("*.safetensors"))) > 1
    model = load(path, quantization_config=FastLoraConfig())
    assert layers(model).keys() == values.keys()
    assert len(values) == LAYERS
    for name, layer in layers(model).items():
        weight, bias = values[name]
        assert layer.dequantize().dtype == weight.dtype
        assert torch.equal(layer.dequantize(), weight), name
        assert (layer.bias is None) == (bias is None)
        assert bias is None or torch.equal(layer.bias, bias)
        assert layer.double_quant == kind.startswith("double")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"]
        == "fastlora"
    )
    same_bits(load(tmp_path), model)


def test_it_computes_what_convert_computes(checkpoints: dict[str, tuple[str, Any]], dense: str) -> None:
    """The codes are those that quantising the dense model gives."""
    path, _ = checkpoints["plain"]
    config = FastLoraConfig(double_quant=False)
    same_bits(
        load(path, quantization_config=FastLoraConfig()),
        load(dense, dtype=torch.bfloat16, quantization_config=config),
    )


def test_bitsandbytes_need_not_be_installed(checkpoints: dict[str, tuple[str, Any]], tmp_path: Path) -> None:
    path, values = checkpoints["double-bf16"]
    name = "model.layers.1.mlp.down_proj"
    safetensors.torch.save_file({"weight": values[name][0]}, tmp_path / "expected.safetensors")
    code = f"""
import sys
sys.modules["bitsandbytes"] = sys.modules["torchao"] = None  # importing either raises ImportError
import fastlora, safetensors.torch, torch, transformers
config = fastlora.FastLoraConfig()
model = transformers.AutoModelForCausalLM.from_pretrained({path!r}, quantization_config=config)
expected = safetensors.torch.load_file({str(tmp_path / "expected.safetensors")!r})["weight"]
assert torch.equal(model.get_submodule({name!r}).dequantize(), expected)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_adapter_on_bitsandbytes_weights(checkpoints: dict[str, tuple[str, Any]]) -> None:
    path, values = checkpoints["double"]
    with pytest.warns(UserWarning, match=r"instead of blocksize=32 \(64\), double_quant=False \(True\)"):
        model = load(path, quantization_config=FastLoraConfig(rank=2, blocksize=32, double_quant=False))
    for name, layer in layers(model).items():
        assert layer.rank == 2
        assert torch.equal(layer.dequantize(), values[name][0])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{ab}" for name in values for ab in "AB"
    }


def test_the_dtype_asked_for(checkpoints: dict[str, tuple[str, Any]]) -> None:
    path, _ = checkpoints["double"]
    model = load(path, dtype=torch.float32, quantization_config=FastLoraConfig())
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.float32}
    half = load(path, quantization_config=FastLoraConfig())
    for name, layer in layers(model).items():
        assert torch.equal(layer.dequantize().bfloat16(), half.get_submodule(name).dequantize())


def rewritten(source: str, directory: Path, change: Any) -> str:
    """A copy in one file, whose tensors `change` has changed."""
    tensors: dict[str, torch.Tensor] = {}
    for file in Path(source).glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
    change(tensors)
    directory.mkdir()
    shutil.copy(Path(source) / "config.json", directory)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def test_another_second_level_is_decoded(checkpoints: dict[str, tuple[str, Any]], tmp_path: Path) -> None:
    """An 8-bit map that is not ours: the absmax values become float32, and the config says so."""
    path, _ = checkpoints["double"]
    expected: dict[str, torch.Tensor] = {}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("nested_quant_map")]:
            tensors[key] = tensors[key] * 0.5
            name = key.removesuffix(".nested_quant_map")
            expected[name] = NF4Weight.from_bitsandbytes(tensors, name).dequantize()

    model = load(rewritten(path, tmp_path / "map", change), quantization_config=FastLoraConfig())
    assert len(expected) == LAYERS
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name.removesuffix(".weight")).dequantize(), weight)
    assert model.config.quantization_config.double_quant is False
    model.save_pretrained(tmp_path / "saved")
    same_bits(load(tmp_path / "saved"), model)


def test_layers_of_two_kinds(checkpoints: dict[str, tuple[str, Any]], tmp_path: Path) -> None:
    path, _ = checkpoints["double"]
    key = "model.layers.0.mlp.up_proj.weight.nested_quant_map"
    path = rewritten(path, tmp_path / "two", lambda tensors: tensors.update({key: tensors[key] * 0.5}))
    with pytest.raises(ValueError, match=r"of one block size .* got \[\(64, False\), \(64, True\)\]"):
        load(path, quantization_config=FastLoraConfig())


def test_what_is_missing_is_listed(checkpoints: dict[str, tuple[str, Any]], tmp_path: Path) -> None:
    path, _ = checkpoints["double"]
    stem = "model.layers.{}.mlp.up_proj.weight"

    def dense_parts(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.0.self_attn.q_proj.bias"]
        for key in [key for key in tensors if key.startswith(stem.format(1))]:
            del tensors[key]

    with pytest.raises(ValueError, match="3 missing from the checkpoint") as raised:
        load(rewritten(path, tmp_path / "dense", dense_parts), quantization_config=FastLoraConfig())
    assert stem.format(1) in str(raised.value)

    def packed_parts(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{stem.format(0)}.absmax"]
        tensors[f"{stem.format(1)}.quant_map"] = torch.zeros(16)

    with pytest.raises(ValueError, match="expected weights that can be quantised, got") as raised:
        load(rewritten(path, tmp_path / "packed", packed_parts), quantization_config=FastLoraConfig())
    assert re.search(rf"{stem.format(0)}: .*absmax is missing", str(raised.value))
    assert re.search(rf"{stem.format(1)}: .*quant_map holds other values", str(raised.value))


def test_a_packed_weight_that_is_no_linear_layers(
    checkpoints: dict[str, tuple[str, Any]], tmp_path: Path
) -> None:
    path, _ = checkpoints["plain"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        packed = NF4Weight.from_bitsandbytes(tensors, "model.layers.0.mlp.up_proj")
        del tensors["model.embed_tokens.weight"]
        embedding = packed.to_bitsandbytes("model.embed_tokens")
        tensors |= {key: t.clone() for key, t in embedding.items()}

    with pytest.raises(ValueError, match=r"of linear layers only, got\n  model\.embed_tokens: not a torch"):
        load(rewritten(path, tmp_path / "embedding", change), quantization_config=FastLoraConfig())


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bitsandbytes 4-bit with bnb_4bit_quant_type 'fp4'"),
        ({"load_in_4bit": False, "load_in_8bit": True}, r"bitsandbytes int8 \(load_in_8bit\)"),
    ],
    ids=["fp4", "int8"],
)
def test_other_kinds_are_named(dense: str, tmp_path: Path, options: Any, found: str) -> None:
    config = transformers.BitsAndBytesConfig(**({"load_in_4bit": True} | options))
    load(dense, dtype=torch.bfloat16, quantization_config=config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"expected a checkpoint that is dense, .*, got {found}"):
        load(tmp_path, quantization_config=FastLoraConfig())
    # and where only the tensors tell
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["quantization_config"] |= {
        "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
        "_load_in_4bit": True, "_load_in_8bit": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"got bitsandbytes (FP4|int8) \(14 layers: model\.layers\.0\."):
        load(tmp_path, quantization_config=FastLoraConfig())


def test_without_our_config_bitsandbytes_reads_its_own(checkpoints: dict[str, tuple[str, Any]]) -> None:
    path, _ = checkpoints["double"]
    model = load(path)
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
