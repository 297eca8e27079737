"""What is put before the input, and learns, while every weight stays: soft prompts and prefixes.

    SoftPrompt   X <- [P; X]                       before the first layer    P (tokens, features)
    Prefix       softmax(q·[P_k; K]ᵀ/√d)·[P_v; V]  in every layer            P_k, P_v (tokens, d), a head's

X being the input's embeddings, K and V a layer's keys and values. Nothing of the model is touched, so its
layers may be of any kind: a 4-bit layer gives its input the gradient that they need. Both are plain modules,
for transformers and for other models; files are PEFT's.

Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021 (SoftPrompt);
Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021 (Prefix).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..adapter_config import CONFIG_NAME
from ..adapter_files import WEIGHTS_NAME, write_files

_KEY = "prompt_embeddings"
_IGNORED = -100  # a label that no loss counts, torch's


class SoftPrompt(nn.Module):
    """Trained embeddings before those of the input.

    Args:
        tokens: how many, at least 1.
        features: of an embedding, the model's hidden size.
        init: the standard deviation of a normal draw (PEFT's is 1), or embeddings (m, features) of real
            tokens, which are taken in order, over and over; the paper found words to be the better start.

    Parameter ``prompt_embeddings`` (tokens, features), float32. Calling it with a batch's embeddings gives
    what a transformers model takes in place of ``input_ids``::

        model(**prompt(model.get_input_embeddings()(ids), attention_mask, labels)).loss.backward()

    Raises ValueError for the arguments.
    """

    def __init__(self, tokens: int, features: int, init: float | Tensor = 0.02) -> None:
        super().__init__()
        _check_positive("SoftPrompt", tokens=tokens, features=features)
        if isinstance(init, Tensor):
            if init.dim() != 2 or init.shape[1] != features or not len(init):
                raise ValueError(
                    f"SoftPrompt: expected init of shape (m >= 1, {features}), got {tuple(init.shape)}"
                )
            start = init.detach()[torch.arange(tokens) % len(init)].to(torch.float32)
        else:
            start = torch.empty(tokens, features).normal_(std=init)
        self.prompt_embeddings = nn.Parameter(start)

    def forward(
        self, embeddings: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The prompt before each row of a batch.

        Args:
            embeddings: of the input, (batch, length, features), of any floating dtype, which the result has.
            attention_mask: (batch, length), 1 where there is a token; the prompt's are.
            labels: (batch, length); the prompt's are -100, which no loss counts.

        Returns inputs_embeds and, of the other two, those that were given, each longer by the prompt. Raises
        ValueError for shapes.
        """
        p = self.prompt_embeddings
        if embeddings.dim() != 3 or embeddings.shape[2] != p.shape[1]:
            raise ValueError(
                f"SoftPrompt: expected embeddings of shape (batch, length, {p.shape[1]}), got "
                f"{tuple(embeddings.shape)}"
            )
        batch, length, _ = embeddings.shape
        rows = p.to(embeddings).expand(batch, -1, -1)
        out = {"inputs_embeds": torch.cat([rows, embeddings], 1)}
        for name, t, value in (("attention_mask", attention_mask, 1), ("labels", labels, _IGNORED)):
            if t is not None:
                if t.shape != (batch, length):
                    raise ValueError(
                        f"SoftPrompt: expected {name} of shape {(batch, length)}, got {tuple(t.shape)}"
                    )
                out[name] = _before(t, len(p), value)
        return out

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        task_type: str | None = None,
        base_model: str | None = None,
    ) -> None:
        """Write PEFT's files of a PROMPT_TUNING adapter to `directory`, which is made if need be.

        task_type, base_model: PEFT's, as for :func:`fastlora.save_adapter`. PEFT needs the former,
        ``"CAUSAL_LM"`` say, to know where the prompt goes.
        """
        config = {"token_dim": self.prompt_embeddings.shape[1], "prompt_tuning_init": "RANDOM"}
        _save("PROMPT_TUNING", self.prompt_embeddings, config, directory, task_type, base_model)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> SoftPrompt:
        """What :meth:`save` or PEFT wrote: prompt tuning, or P-tuning, whose files hold its encoder's output.
        Raises ValueError for another adapter, FileNotFoundError."""
        _, t = _load("SoftPrompt", Path(directory), ("PROMPT_TUNING", "P_TUNING"))
        return cls(t.shape[0], t.shape[1], init=t)


class Prefix(nn.Module):
    """Trained keys and values before those of every attention layer.

    Args:
        tokens: how many, at least 1.
        num_layers, heads, head_dim: of the model's keys and values; under grouped-query attention heads are
            `num_key_value_heads`.
        hidden: None for keys and values that learn themselves. With a width, those of token t in all layers
            are W₂·tanh(W₁·p_t + b₁) + b₂, of an embedding p_t (heads · head_dim,) that learns, as W₁ and W₂
            do: the paper's reparametrisation, for a steadier training. :meth:`folded` takes it away.
        std: of the normal draw that keys and values, or the p_t, start from.

    Calling it gives a batch's pairs (key, value), which become past keys and values::

        mask = prefix.extended(attention_mask)
        model(input_ids=ids, attention_mask=mask, past_key_values=DynamicCache(prefix(len(ids))), labels=ids)

    The input's positions follow the prefix's. transformers uses no cache under gradient checkpointing, and so
    no prefix: leave that off. Raises ValueError for the arguments.
    """

    def __init__(
        self,
        tokens: int,
        num_layers: int,
        heads: int,
        head_dim: int,
        *,
        hidden: int | None = None,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        sizes = {"tokens": tokens, "num_layers": num_layers, "heads": heads, "head_dim": head_dim}
        _check_positive("Prefix", **sizes, **({} if hidden is None else {"hidden": hidden}))
        self.tokens, self.num_layers, self.heads, self.head_dim = tokens, num_layers, heads, head_dim
        token_dim = heads * head_dim
        width = 2 * num_layers * token_dim
        self.mlp: nn.Module | None = None
        if hidden is not None:
            self.mlp = nn.Sequential(nn.Linear(token_dim, hidden), nn.Tanh(), nn.Linear(hidden, width))
        start = torch.empty(tokens, width if hidden is None else token_dim).normal_(std=std)
        self.prompt_embeddings = nn.Parameter(start)

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[Tensor, ...]]) -> Prefix:
        """One that starts from keys and values (1, heads, tokens, head_dim) of each layer, of real words in
        a cache, as the paper advises where there is little data. Raises ValueError for shapes."""
        held = [t.detach() for pair in pairs for t in pair[:2]]
        if not held or held[0].dim() != 4 or len({t.shape for t in held}) > 1 or len(held[0]) != 1:
            raise ValueError(
                "Prefix.from_pairs: expected keys and values of one shape (1, heads, tokens, head_dim), got "
                f"{[tuple(t.shape) for t in held[:2]]} ..."
            )
        _, heads, tokens, head_dim = held[0].shape
        prefix = cls(tokens, len(held) // 2, heads, head_dim)
        with torch.no_grad():
            prefix.prompt_embeddings.copy_(torch.stack([t[0] for t in held]).permute(2, 0, 1, 3).flatten(1))
        return prefix

    def values(self) -> Tensor:
        """All of them, (tokens, 2 · num_layers · heads · head_dim): a layer's keys, then its values."""
        return self.prompt_embeddings if self.mlp is None else self.mlp(self.prompt_embeddings)

    def forward(self, batch: int = 1, dtype: torch.dtype | None = None) -> tuple[tuple[Tensor, Tensor], ...]:
        """A pair (key, value) for each layer, each (batch, heads, tokens, head_dim), in `dtype`, by default
        the parameters'."""
        every = self.values().to(dtype or self.prompt_embeddings.dtype)
        every = every.unflatten(1, (2 * self.num_layers, self.heads, self.head_dim)).permute(1, 2, 0, 3)
        rows = [t.expand(batch, -1, -1, -1) for t in every]
        return tuple(zip(rows[::2], rows[1::2], strict=True))

    def extended(self, attention_mask: Tensor) -> Tensor:
        """A mask (batch, length) with ones before it, for the prefix."""
        if attention_mask.dim() != 2:
            raise ValueError(
                "Prefix.extended: expected an attention_mask of shape (batch, length), got "
                f"{tuple(attention_mask.shape)}"
            )
        return _before(attention_mask, self.tokens, 1)

    @torch.no_grad()
    def folded(self) -> Prefix:
        """The same keys and values as a Prefix without a reparametrisation, for inference."""
        new = Prefix(self.tokens, self.num_layers, self.heads, self.head_dim)
        new.prompt_embeddings = nn.Parameter(self.values().detach().clone())
        return new.train(self.training)

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        task_type: str | None = None,
        base_model: str | None = None,
    ) -> None:
        """Write PEFT's files of a PREFIX_TUNING adapter, folded. Arguments as for :meth:`SoftPrompt.save`."""
        config = {
            "token_dim": self.heads * self.head_dim,
            "num_layers": self.num_layers,
            "num_attention_heads": self.heads,
            "encoder_hidden_size": self.heads * self.head_dim,
            "prefix_projection": False,
        }
        _save("PREFIX_TUNING", self.values(), config, directory, task_type, base_model)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Prefix:
        """What :meth:`save` or PEFT wrote, folded. ValueError for another adapter, FileNotFoundError."""
        config, t = _load("Prefix", Path(directory), ("PREFIX_TUNING",))
        layers, heads, features = (
            config.get(key) for key in ("num_layers", "num_attention_heads", "token_dim")
        )
        if not layers or not heads or not features or t.shape[1] != 2 * layers * features or features % heads:
            raise ValueError(
                f"Prefix.load: expected {_KEY} of 2 · num_layers {layers} · token_dim {features} columns, of "
                f"{heads} heads, got {t.shape[1]}"
            )
        prefix = cls(len(t), layers, heads, features // heads)
        with torch.no_grad():
            prefix.prompt_embeddings.copy_(t)
        return prefix


def _before(t: Tensor, tokens: int, value: int) -> Tensor:
    """(batch, length) with columns of a value before it."""
    return torch.cat([t.new_full((len(t), tokens), value), t], 1)


def _check_positive(op: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{op}: expected {name} as an int >= 1, got {size!r}")


# --- files ------------------------------------------------------------------------------------------------


def _save(
    kind: str,
    values: Tensor,
    more: Mapping[str, Any],
    directory: str | os.PathLike[str],
    task_type: str | None,
    base_model: str | None,
) -> None:
    config = {
        "peft_type": kind,
        "num_virtual_tokens": len(values),
        "num_transformer_submodules": 1,
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **more,
    }
    write_files(Path(directory), config, {_KEY: values.detach().to("cpu").contiguous()})


def _load(op: str, path: Path, kinds: tuple[str, ...]) -> tuple[dict[str, Any], Tensor]:
    """An adapter's config and its one tensor, (num_virtual_tokens, columns)."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{op}.load: expected {name} in {path}, got none")
    try:
        config = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{op}.load: expected a JSON object in {path / CONFIG_NAME}, got {error}") from error
    if kind not in kinds:
        raise ValueError(f"{op}.load: expected peft_type {' or '.join(kinds)} in {path}, got {kind!r}")
    tensors = safetensors.torch.load_file(path / WEIGHTS_NAME)
    t, tokens = tensors.get(_KEY), config.get("num_virtual_tokens")
    if len(tensors) != 1 or t is None or t.dim() != 2 or len(t) != tokens or config.get("modules_to_save"):
        found = {key: tuple(one.shape) for key, one in list(tensors.items())[:4]}
        raise ValueError(f"{op}.load: expected {_KEY} of {tokens} rows alone in {path}, got {found}")
    return config, t
