"""The two kinds of model the demo can work on: its own byte-level one, and a Hugging Face folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from _tiny_lm import Config, TinyLM
from _training import Subject, multiplies_bfloat16
from torch import Tensor


def _encode_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _decode_bytes(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def byte_subject(config: Config) -> Subject:
    """An untrained byte-level transformer: its tokens are bytes, so it needs no tokenizer."""
    return Subject("byte-level transformer", TinyLM(config), config.context, _encode_bytes, _decode_bytes)


def hugging_face_subject(folder: Path, *, context: int) -> Subject:
    """A causal LM and its tokenizer from a local folder; nothing is downloaded.

    Raises RuntimeError without transformers, ValueError if the folder is not there.
    """
    if not folder.is_dir():
        raise ValueError(f"--model: expected a folder that holds a Hugging Face model, got {folder}")
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError("--model needs the transformers package: pip install transformers") from error
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.bfloat16 if multiplies_bfloat16() else torch.float32
    )
    limit = getattr(model.config, "max_position_embeddings", context)

    def encode(text: str) -> Tensor:
        # verbose=False: it is cut into windows afterwards, so that its length is no error
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens))

    return Subject(folder.name, model, min(context, limit), encode, decode)


def rebuild(description: dict) -> Subject:
    """The dense skeleton that describe() told of; weights follow for the byte-level one."""
    if description["kind"] == "bytes":
        return byte_subject(Config(**description["config"]))
    return hugging_face_subject(Path(description["folder"]), context=description["context"])


def describe(subject: Subject, folder: Path | None) -> dict:
    """What another process needs to rebuild the subject; JSON."""
    if folder is None:
        return {"kind": "bytes", "config": asdict(subject.model.config)}
    return {"kind": "hugging face", "folder": str(folder.resolve()), "context": subject.context}
