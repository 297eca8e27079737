"""What the demo does to any language model: train it, measure it, sample from it, take its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional

import fastlora


@dataclass
class Subject:
    """A causal language model, and how text becomes its tokens and back."""

    name: str
    model: (
        nn.Module
    )  # tokens int64 (batch, time) -> logits (batch, time, vocabulary), or an object with .logits
    context: int
    encode: Callable[[str], Tensor]  # to integers (tokens)
    decode: Callable[[list[int]], str]

    def logits(self, tokens: Tensor) -> Tensor:
        with precision():
            out = self.model(tokens)
        return getattr(out, "logits", out).float()


def multiplies_bfloat16() -> bool:
    """Whether this processor does; elsewhere torch would emulate it, and float32 is faster."""
    return fastlora.current_isa() in ("avx512_bf16", "amx")


def precision() -> AbstractContextManager[None]:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=multiplies_bfloat16())


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=32),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )


def random_windows(data: Tensor, rows: int, context: int, generator: torch.Generator) -> Tensor:
    """int64 (rows, context + 1), each row from a random place in data (tokens)."""
    starts = torch.randint(data.numel() - context, (rows, 1), generator=generator)
    return data[starts + torch.arange(context + 1)].long()


def even_windows(data: Tensor, count: int, context: int) -> Tensor:
    """int64 (at most count, context + 1), spread evenly over data (tokens), the same at every call."""
    count = max(1, min(count, data.numel() // (context + 1)))
    starts = torch.linspace(0, data.numel() - context - 1, count).long()[:, None]
    return data[starts + torch.arange(context + 1)].long()


def next_token_loss(subject: Subject, window: Tensor) -> Tensor:
    logits = subject.logits(window[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(subject: Subject, data: Tensor, *, count: int) -> float:
    """Mean next-token loss in nats over `count` fixed windows of data."""
    subject.model.eval()
    windows = even_windows(data, count, subject.context)
    losses = [next_token_loss(subject, part).item() * len(part) for part in windows.split(8)]
    return sum(losses) / len(windows)


@dataclass
class History:
    """Training losses by step, and held-out losses as (step, loss)."""

    label: str
    train: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


def train(
    subject: Subject,
    data: Tensor,
    held_out: Tensor,
    *,
    label: str,
    steps: int,
    rows: int,
    lr: float,
    weight_decay: float,
    eval_windows: int,
    seed: int,
) -> History:
    """AdamW over whatever parameters ask for gradients: all of them in pre-training, the adapters after."""
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.02, 1 - step / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    history = History(label)
    history.held_out.append((0, held_out_loss(subject, held_out, count=eval_windows)))
    with progress_bar() as bar:
        task = bar.add_task(label, total=steps, loss=history.held_out[0][1])
        for step in range(1, steps + 1):
            subject.model.train()
            loss = next_token_loss(subject, random_windows(data, rows, subject.context, generator))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            history.train.append(loss.item())
            if step == steps or (step % max(1, steps // 4) == 0 and steps - step > steps // 8):
                history.held_out.append((step, held_out_loss(subject, held_out, count=eval_windows)))
            bar.update(task, completed=step, loss=history.train[-1])
    return history


@torch.no_grad()
def sample(subject: Subject, prompt: str, *, tokens: int, seed: int, temperature: float = 0.6) -> str:
    """`tokens` more tokens after the prompt; without a cache: the whole context is read again for each."""
    subject.model.eval()
    generator = torch.Generator().manual_seed(seed)
    text = subject.encode(prompt).long()[None]
    for _ in range(tokens):
        logits = subject.logits(text[:, -subject.context :])[0, -1]
        choice = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        text = torch.cat((text, choice[None]), dim=1)
    return subject.decode(text[0].tolist())


@torch.no_grad()
def fingerprint(subject: Subject, tokens: Tensor) -> str:
    """SHA-256 over every bit of the logits for tokens (batch, time)."""
    subject.model.eval()
    return hashlib.sha256(subject.logits(tokens).contiguous().numpy().tobytes()).hexdigest()
