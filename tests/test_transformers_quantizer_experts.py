"""FastLoraConfig on mixtures of experts, whose checkpoints have a tensor an expert or stacked ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hf_models import ids, load, same_bits, saved

import fastlora
from fastlora import FastLoraConfig, QExperts
from fastlora.integrations.experts import dense_experts

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")


def experts(model: Any) -> dict[str, QExperts]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QExperts)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("dense")
    return {family: saved(family, root / family, max_shard_size="100KB") for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_saved_and_loaded_again(dense: dict[str, str], tmp_path: Path, family: str) -> None:
    reference = load(dense[family], dtype=torch.bfloat16)
    fastlora.convert(reference, rank=0, progress=False)
    model = load(dense[family], dtype=torch.bfloat16, quantization_config=FastLoraConfig())
    assert len(experts(model)) == 2
    same_bits(model, reference)
    report = model.hf_quantizer.report
    assert sum(c.experts is not None for c in report.converted) == 4
    model.save_pretrained(tmp_path / "one", max_shard_size="50KB")
    again = load(tmp_path / "one")
    same_bits(again, model)
    again.save_pretrained(tmp_path / "two")
    same_bits(load(tmp_path / "two"), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_experts_and_dequantised(dense: dict[str, str], tmp_path: Path, family: str) -> None:
    model = load(dense[family], quantization_config=FastLoraConfig(rank=0, expert_rank=2, alpha=3))
    learns = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(learns) == 2 * 4
    assert all("experts." in name and "lora_" in name for name in learns)
    for name in learns:
        torch.nn.init.normal_(model.get_parameter(name), std=0.1)
    model.save_pretrained(tmp_path / "packed")
    same_bits(load(tmp_path / "packed"), model)
    with torch.no_grad():
        expected = model(ids()).logits
        back = model.dequantize()
        assert not experts(back)
        torch.testing.assert_close(back(ids()).logits, expected, rtol=1e-4, atol=1e-4)
    back.save_pretrained(tmp_path / "dense")
    same_bits(load(tmp_path / "dense"), back)


def test_an_expert_that_is_missing(dense: dict[str, str], tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for file in Path(dense["mixtral"]).glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
    (gone,) = (key for key in tensors if "layers.1." in key and "experts.2.w2" in key)
    del tensors[gone]
    (tmp_path / "config.json").write_text((Path(dense["mixtral"]) / "config.json").read_text())
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = r"layers\.1\.mlp\.experts\.down_proj: .*expected down_proj of shape \(3, .*got \(2, "
    with pytest.raises(ValueError, match=message):
        load(tmp_path, quantization_config=FastLoraConfig())


def test_experts_that_no_stock_module_was_the_origin_of() -> None:
    with pytest.raises(TypeError, match="expected experts made from a stock module, got activation SwiGLU"):
        dense_experts(QExperts(2, 32, 32, rank=0))
