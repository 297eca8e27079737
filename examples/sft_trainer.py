"""TRL's SFTTrainer on a 4-bit model: a base in NF4, an adapter from PEFT, text from this machine.

    python examples/sft_trainer.py                  # a small random Llama, seconds of training
    python examples/sft_trainer.py --model FOLDER   # a local Hugging Face model and its tokenizer

Nothing is downloaded. The linear layers become QLinear, SFTTrainer wraps them in PEFT's adapters, and these
learn English from Python's language reference. The exit code is 0 only if the loss on topics that were held
out fell, and the saved adapter gives it again on a base that is quantised anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _text import english
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

import fastlora

END, PAD = "<|end|>", "<|pad|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, and nothing else but an end and a padding."""
    words = {word: i for i, word in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), END, PAD])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def subject(folder: Path | None, seed: int) -> tuple[Any, Callable[[], Any]]:
    """A tokenizer, and what makes the same dense model every time it is called."""
    if folder is not None:
        if not folder.is_dir():
            raise ValueError(f"--model: expected a folder that holds a Hugging Face model, got {folder}")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return tokenizer, lambda: AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip

    def make() -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)

    return tokenizer, make


def pieces(text: str, count: int, length: int) -> Dataset:
    """The first `count` pieces of `length` characters."""
    starts = range(0, min(len(text), count * length), length)
    return Dataset.from_dict({"text": [text[start : start + length] for start in starts]})


def quantized(make: Callable[[], Any]) -> Any:
    model = make()
    print(fastlora.convert(model, rank=0, progress=False))
    return model


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="a folder with a Hugging Face model (default: a random Llama)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("sft_out"), help="where checkpoints and the adapter go"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    tokenizer, make = subject(options.model, options.seed)
    text = english(seed=options.seed)
    held_out = pieces(text.held_out, count=32, length=128)
    arguments = SFTConfig(
        str(options.out), max_steps=options.steps, learning_rate=options.learning_rate, seed=options.seed,
        per_device_train_batch_size=8, per_device_eval_batch_size=16, max_length=128, logging_steps=10,
        save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(), bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        quantized(make),
        arguments,
        train_dataset=pieces(text.train, count=8 * options.steps, length=128),
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(options.out / "adapter"))

    again = PeftModel.from_pretrained(quantized(make), options.out / "adapter")
    loaded = SFTTrainer(
        again, arguments, train_dataset=held_out, eval_dataset=held_out, processing_class=tokenizer
    ).evaluate()["eval_loss"]
    checks = {
        f"training lowered the loss on text held out: {before:.4f} to {after:.4f}": after < before,
        f"the saved adapter gives it on a base quantised anew: {loaded:.4f}": loaded == after,
    }
    for what, holds in checks.items():
        print("yes" if holds else "NO ", what)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
