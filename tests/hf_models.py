"""Tiny transformers models made from configs, and checkpoints of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="these tests are about transformers, from 5.23 on"
)

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, **SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, **SIZES, tie_word_embeddings=True),  # has biases
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, **SIZES, head_dim=24, tie_word_embeddings=True),
    "mixtral": lambda: transformers.MixtralConfig(
        **COMMON, **SIZES, num_local_experts=3, num_experts_per_tok=2
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON, **SIZES, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **COMMON, **SIZES, num_local_experts=3, num_experts_per_tok=2, head_dim=16
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    ),
}


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with weights that differ from run to run in nothing; biases that are not zero."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)
    return model.eval()


def saved(family: str, directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> str:
    make(family, dtype).save_pretrained(directory, **options)
    return str(directory)


def load(path: object, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(str(path), **options)


def ids() -> Tensor:
    return torch.arange(3, 3 + 2 * 9).reshape(2, 9)


def same_bits(a: Any, b: Any) -> None:
    """Of two models: the same parameters and buffers, and the same answer."""
    mine, theirs = a.state_dict(), b.state_dict()
    assert list(mine) == list(theirs)
    for name, t in mine.items():
        assert t.dtype == theirs[name].dtype, name
        assert torch.equal(t.view(torch.uint8), theirs[name].view(torch.uint8)), name
    with torch.no_grad():
        assert torch.equal(a(ids()).logits, b(ids()).logits)
