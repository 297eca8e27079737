"""Small models as trainers build them with PEFT: a Llama whose linear layers are bitsandbytes' 4-bit ones,
dense ones or QLinear, with LoRA layers over some of them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fastlora

peft = pytest.importorskip("peft", reason="PEFT is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

BASES = ("bitsandbytes", "dense")
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, 96, (4, 12), generator=torch.Generator().manual_seed(7))


def llama(base: str = "bitsandbytes", *, dtype: torch.dtype = torch.float32, **quant: Any) -> nn.Module:
    """Two blocks of 64 features, weights drawn with seed 0. `quant`: for bitsandbytes' Linear4bit."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype)
    for one in model.modules():
        if isinstance(one, nn.Linear) and one.bias is not None:
            nn.init.normal_(one.bias, std=0.1)
    if base == "bitsandbytes":
        four_bits(model, compute_dtype=dtype, **quant)
    return model


class Pair(nn.Module):
    """Two layers alone: what a compiler is through with soon."""

    def __init__(self, base: str, **quant: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up_proj, self.down_proj = nn.Linear(64, 128), nn.Linear(128, 64)
        if base == "bitsandbytes":
            four_bits(self, compute_dtype=torch.float32, **quant)

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.down_proj(self.up_proj(x).relu())


def four_bits(
    model: nn.Module, compute_dtype: torch.dtype, quant_type: str = "nf4", cls: Any = None, **quant: Any
) -> None:
    """What transformers does for a BitsAndBytesConfig, for weights that are there already."""
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and not name.endswith("lm_head"):
            kinds = {} if cls is not None else {"quant_type": quant_type}
            layer = (cls or bnb.nn.Linear4bit)(
                linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=compute_dtype,
                **kinds, **quant,
            )  # fmt: skip
            layer.load_state_dict(linear.state_dict())
            layer.support_avx512bf16_for_cpu = False  # evaluation would change its weight
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.to("cpu"))
    model.is_loaded_in_4bit = model.is_quantized = True


def lora(model: nn.Module, *, seed: int = 1, **options: Any) -> Any:
    """With an adapter, "default", whose lora_B is not zero."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options
    if isinstance(model, Pair):
        options["target_modules"] = ["up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    return drawn(model, "default", seed)


def drawn(model: Any, adapter: str, seed: int) -> Any:
    """An adapter's values drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f"lora_B.{adapter}." in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
            if f"lora_magnitude_vector.{adapter}." in name:
                p.mul_(1 + 0.2 * torch.randn(p.shape, generator=generator))
    return model


def added(model: Any, name: str, seed: int, **options: Any) -> None:
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options
    torch.manual_seed(seed)
    model.add_adapter(name, peft.LoraConfig(**options))
    drawn(model, name, seed)


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model, patched."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = copy.deepcopy(model)
    fastlora.patch(other, show=False)
    return other


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


def step(model: Any, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A training step's loss and gradients."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, **options).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_same_step(got: Any, want: Any, tolerance: float = 3e-5) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=0)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        scale = gradient.float().norm().clamp(min=1e-6)
        error = ((got[1][name] - gradient).float().norm() / scale).item()
        assert error < tolerance, f"{name}: relative error {error:.2g}"
