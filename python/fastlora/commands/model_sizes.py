"""A language model's matrices, from its config.json or from a number of weights: what `estimate` counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelSizes:
    """Of a decoder of equal layers.

    Attributes:
        linears: by name, the (out, in) of each linear layer in one block.
        layers: blocks.
        other: weights outside those matrices: embeddings, the head, norms, biases.
        hidden, vocab: features between blocks, and tokens known.
        source: where the sizes are from, for people.
    """

    linears: Mapping[str, tuple[int, int]]
    layers: int
    other: int
    hidden: int
    vocab: int
    source: str

    @property
    def linear_weights(self) -> int:
        return self.layers * sum(n * k for n, k in self.linears.values())

    @property
    def weights(self) -> int:
        return self.linear_weights + self.other

    def selected(self, targets: Iterable[str] | None) -> list[tuple[int, int]]:
        """The (out, in) of a block's layers with adapters; None for all. Raises ValueError for a name that
        is no layer's."""
        if targets is None:
            return list(self.linears.values())
        wanted = list(targets)
        found = {t: [s for name, s in self.linears.items() if f".{name}".endswith(f".{t}")] for t in wanted}
        unknown = [t for t, shapes in found.items() if not shapes]
        if unknown or not wanted:
            raise ValueError(
                f"--targets: expected names of {', '.join(self.linears)}, got {unknown or 'none'}"
            )
        names = [name for name in self.linears if any(f".{name}".endswith(f".{t}") for t in wanted)]
        return [self.linears[name] for name in names]


def one_layer(out_features: int, in_features: int) -> ModelSizes:
    """A single linear layer."""
    shape = {"layer": (out_features, in_features)}
    return ModelSizes(shape, 1, 0, in_features, 0, f"one layer of {out_features} x {in_features}")


def of_count(weights: int, vocab: int = 50257) -> ModelSizes:
    """A decoder of about this many weights, in GPT-3's proportions: hidden = 128 · layers, four attention
    matrices of hidden x hidden and two of 4·hidden x hidden in a block, an embedding tied to the head. Raises
    ValueError for fewer than a million."""
    if weights < 10**6:
        raise ValueError(f"estimate: expected a model of a million weights at least, got {weights}")
    hidden = max(128, round((128 * weights / 12) ** (1 / 3) / 128) * 128)
    layers = max(1, round((weights - vocab * hidden) / (12 * hidden**2)))
    linears = {f"{name}_proj": (hidden, hidden) for name in "qkvo"}
    linears |= {"up_proj": (4 * hidden, hidden), "down_proj": (hidden, 4 * hidden)}
    other = max(0, weights - layers * 12 * hidden**2)
    where = f"a decoder in GPT-3's proportions: {layers} layers of {hidden} features"
    return ModelSizes(linears, layers, other, hidden, vocab, where)


def of_config(path: Path) -> ModelSizes:
    """Of a config.json, or a folder with one. Raises FileNotFoundError, and ValueError for a kind of model
    that is not known here and for missing fields."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"estimate: expected a config.json or a folder with one, got {path}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"estimate: expected JSON in {file}, got {error}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in _FAMILIES:
        raise ValueError(f"estimate: expected model_type {', '.join(_FAMILIES)} in {file}, got {kind!r}")
    try:
        return _FAMILIES[kind](config, str(path))
    except KeyError as error:
        raise ValueError(f"estimate: expected {error.args[0]} in {file}, got none") from None
    except TypeError as error:
        raise ValueError(f"estimate: expected numbers for sizes in {file}, got {error}") from None


def _llama(c: dict[str, Any], source: str) -> ModelSizes:
    """Llama, Mistral, Qwen2, Qwen3."""
    kind, h, i, layers = c["model_type"], c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    heads = c["num_attention_heads"]
    kv_heads = c.get("num_key_value_heads") or heads
    head = c.get("head_dim") or (128 if kind == "qwen3" else h // heads)
    q, kv = heads * head, kv_heads * head
    linears = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
    linears |= {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
    in_layer = 2 * h
    if kind == "qwen2":
        in_layer += q + 2 * kv
    elif c.get("attention_bias"):
        in_layer += q + 2 * kv + h
    if kind == "llama" and c.get("mlp_bias"):
        in_layer += 2 * i + h
    if kind == "qwen3":
        in_layer += 2 * head
    embeddings = 1 if c.get("tie_word_embeddings") else 2
    other = layers * in_layer + h + embeddings * c["vocab_size"] * h
    return ModelSizes(linears, layers, other, h, c["vocab_size"], source)


def _gpt2(c: dict[str, Any], source: str) -> ModelSizes:
    h, layers = c["n_embd"], c["n_layer"]
    i = c.get("n_inner") or 4 * h
    linears = {
        "attn.c_attn": (3 * h, h), "attn.c_proj": (h, h), "mlp.c_fc": (i, h), "mlp.c_proj": (h, i),
    }  # fmt: skip
    other = _biases_and_norms(linears, layers, h) + (c["vocab_size"] + c["n_positions"]) * h
    return ModelSizes(linears, layers, other, h, c["vocab_size"], source)


def _gpt_neox(c: dict[str, Any], source: str) -> ModelSizes:
    h, i, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    linears = {
        "attention.query_key_value": (3 * h, h), "attention.dense": (h, h),
        "mlp.dense_h_to_4h": (i, h), "mlp.dense_4h_to_h": (h, i),
    }  # fmt: skip
    embeddings = 1 if c.get("tie_word_embeddings") else 2
    other = _biases_and_norms(linears, layers, h) + embeddings * c["vocab_size"] * h
    if not c.get("attention_bias", True):
        other -= layers * 4 * h
    return ModelSizes(linears, layers, other, h, c["vocab_size"], source)


def _biases_and_norms(linears: Mapping[str, tuple[int, int]], layers: int, hidden: int) -> int:
    """Of a GPT: a bias for every linear layer, two LayerNorms a block and one after the last."""
    return layers * (sum(n for n, _ in linears.values()) + 4 * hidden) + 2 * hidden


_FAMILIES: dict[str, Callable[[dict[str, Any], str], ModelSizes]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
