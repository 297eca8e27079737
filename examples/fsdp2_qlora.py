"""QLoRA on several processes: a 4-bit Llama sharded by FSDP2, its adapters trained on local text.

    torchrun --nproc-per-node 2 examples/fsdp2_qlora.py                        # on CPUs, through gloo
    torchrun --nproc-per-node 2 examples/fsdp2_qlora.py --steps 200 --resume   # from the last checkpoint on
    torchrun --nproc-per-node 8 examples/fsdp2_qlora.py --bf16 --lr 2e-4 --model FOLDER   # with GPUs: NCCL

Without --model a small Llama is made from a configuration, with random weights and bytes for tokens: what its
adapters learn is little, but everything on the way is what a large model's would be. Every linear layer but
lm_head becomes NF4 with an adapter; each decoder layer is a group of parameters that FSDP2 deals out to the
ranks, packed codes and scales as they are, and gathers while the layer runs. Nothing is downloaded.

Written to --out: checkpoint-STEP/, the adapters and AdamW's state in pieces, by torch.distributed.checkpoint,
for any number of ranks; adapter/, in PEFT's format, for one process or any other library. Both appear under
their names only when they are complete. The exit code is 0 only if the held-out loss fell.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _subjects import hugging_face_subject
from _text import english
from _training import Subject, even_windows, random_windows
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from tqdm.auto import tqdm

import fastlora

ADAPTERS_ONLY = StateDictOptions(ignore_frozen_params=True)  # the base comes from --model or --seed again
ONE_BASE = ("model", "rank", "alpha", "seed")  # arguments that a run which goes on must have in common


def main() -> int:
    options = parse_arguments()
    device = join()
    try:
        return run(options, device)
    finally:
        distributed.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="a local Hugging Face causal LM with decoder layers")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to learn; default: Python's language reference")
    add("--out", type=Path, default=Path("fsdp2_out"), metavar="DIR", help="default: fsdp2_out")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--steps", type=int, default=100, help="in all, those before --resume included; default: 100")
    add("--checkpoint-every", type=int, default=50, metavar="N", help="steps; default: 50, and at the end")
    add("--rows", type=int, default=4, help="windows of text a rank, a micro-batch; default: 4")
    add("--accumulate", type=int, default=1, metavar="N", help="micro-batches a step; default: 1")
    add("--context", type=int, default=128, help="tokens a window; default: 128")
    add("--lr", type=float, default=1e-2, help="default: 1e-2; large models want about 2e-4")
    add("--rank", type=int, default=16, help="of the adapters; default: 16")
    add("--alpha", type=float, default=32, help="default: 32")
    add("--bf16", action="store_true", help="compute in bfloat16; adapters and their sums stay float32")
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("steps", "checkpoint_every", "rows", "accumulate", "context", "rank"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    if "RANK" not in os.environ:
        parser.error(
            "expected to be started by torchrun: torchrun --nproc-per-node 2 examples/fsdp2_qlora.py"
        )
    return options


def join() -> torch.device:
    """This process's place among those that torchrun started, and its device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        distributed.init_process_group("gloo")
    return device


def run(options: argparse.Namespace, device: torch.device) -> int:
    begin, rank, size = time.perf_counter(), distributed.get_rank(), distributed.get_world_size()
    say = print if rank == 0 else lambda *_: None
    torch.manual_seed(options.seed)  # all ranks draw the same base
    subject = llama(options.context) if options.model is None else hugging_face_subject(
        options.model, context=options.context
    )  # fmt: skip
    train, held_out = texts(subject, options)
    report = fastlora.convert(subject.model, rank=options.rank, alpha=options.alpha, progress=rank == 0)
    shard(subject.model, torch.bfloat16 if options.bf16 else None)
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)
    mine = sum(local(p).nbytes for p in subject.model.parameters())
    layers = f"{len(report.converted)} layers in NF4"
    say(f"{subject.name} | {size} ranks on {device.type} | {layers} | {mine / 2**20:.2f} MiB a rank")

    first = load_checkpoint(subject.model, optimizer, options) if options.resume else 0
    before = held_out_loss(subject, held_out, device)
    with tqdm(
        range(first + 1, options.steps + 1),
        initial=first,
        total=options.steps,
        disable=rank != 0,
        unit="step",
    ) as bar:
        for step in bar:
            loss = learn(subject, optimizer, parameters, train, options, step, device)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            if step % options.checkpoint_every == 0 or step == options.steps:
                save_checkpoint(subject.model, optimizer, options, step)
    after = held_out_loss(subject, held_out, device)
    if rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
    fastlora.save_adapter(subject.model, options.out / "adapter")  # gathered by all ranks
    say(f"held-out loss {before:.4f} -> {after:.4f} in steps {first + 1} to {options.steps}")
    say(f"wrote {options.out}/adapter; {time.perf_counter() - begin:.0f} s in all")
    return 0 if after < before else 1


# --- the model and its text -------------------------------------------------------------------------------


def llama(context: int) -> Subject:
    """A small Llama with random weights, whose tokens are bytes."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise RuntimeError("fsdp2_qlora needs the transformers package: pip install transformers") from error
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
    )

    def encode(text: str) -> Tensor:
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    return Subject("Llama of random weights", LlamaForCausalLM(config), context, encode, decode)


def texts(subject: Subject, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Tokens to train on and held-out ones, the same on every rank."""
    if options.text is None:
        domain = english(seed=options.seed)
        train, held_out = subject.encode(domain.train), subject.encode(domain.held_out)
    else:
        tokens = subject.encode(options.text.read_text(encoding="utf-8"))
        train, held_out = tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]
    if len(held_out) <= subject.context:
        raise ValueError(
            f"--text: expected more than {10 * subject.context} tokens, got {len(train) + len(held_out)}"
        )
    return train, held_out


def shard(model: nn.Module, param_dtype: torch.dtype | None) -> None:
    """Each decoder layer is gathered as it runs and let go after it; the rest is one group more."""
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32 if param_dtype else None
    )
    for layer in model.get_submodule("model.layers"):
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def local(p: Tensor) -> Tensor:
    return p.to_local() if hasattr(p, "to_local") else p


# --- training ---------------------------------------------------------------------------------------------


def learn(
    subject: Subject,
    optimizer: torch.optim.Optimizer,
    parameters: list[Tensor],
    train: Tensor,
    options: argparse.Namespace,
    step: int,
    device: torch.device,
) -> float:
    """One step; returns its loss, the mean over ranks. What a rank reads depends on seed, step and rank only,
    so a run that was interrupted reads what it would have read."""
    model: Any = subject.model
    model.train()
    place = step * distributed.get_world_size() + distributed.get_rank()
    generator = torch.Generator().manual_seed(options.seed * 2**32 + place)
    total = torch.zeros((), device=device)
    for i in range(options.accumulate):
        model.set_requires_gradient_sync(i == options.accumulate - 1)
        window = random_windows(train, options.rows, subject.context, generator).to(device)
        loss = next_token_loss(model, window) / options.accumulate
        loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return mean_over_ranks(total).item()


def next_token_loss(model: nn.Module, window: Tensor) -> Tensor:
    logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(subject: Subject, held_out: Tensor, device: torch.device) -> float:
    """Mean over windows, 8 a rank (fewer where the text is short)."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    subject.model.eval()
    windows = even_windows(held_out, 8 * size, subject.context)
    each = max(1, len(windows) // size)  # ranks must call the model equally often
    mine = windows[torch.arange(rank * each, (rank + 1) * each) % len(windows)].to(device)
    losses = [next_token_loss(subject.model, part) * len(part) for part in mine.split(4)]
    return mean_over_ranks(sum(losses) / each).item()


def mean_over_ranks(t: Tensor) -> Tensor:
    distributed.all_reduce(t)
    return t / distributed.get_world_size()


# --- checkpoints ------------------------------------------------------------------------------------------


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer, options=ADAPTERS_ONLY)
    return {"model": of_model, "optimizer": of_optimizer}


def save_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, options: argparse.Namespace, step: int
) -> None:
    """Each rank writes its part under a temporary name; the first renames the whole when all have."""
    final = options.out / f"checkpoint-{step}"
    unfinished = options.out / f".checkpoint-{step}.tmp"
    if distributed.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    distributed.barrier()
    held = states(model, optimizer) | {"run": {name: str(getattr(options, name)) for name in ONE_BASE}}
    checkpoint.save(held, checkpoint_id=unfinished)
    if distributed.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
    distributed.barrier()


def load_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, options: argparse.Namespace) -> int:
    """Returns the step that the newest checkpoint was written after."""
    steps = [int(path.name.split("-")[1]) for path in options.out.glob("checkpoint-*")]
    if not steps:
        raise FileNotFoundError(f"--resume: expected a checkpoint in {options.out}, got none")
    path = options.out / f"checkpoint-{max(steps)}"
    run = {"run": dict.fromkeys(ONE_BASE, "")}
    checkpoint.load(run, checkpoint_id=path)
    for name, was in run["run"].items():
        if was != str(getattr(options, name)):
            raise ValueError(
                f"--resume: expected --{name} {was}, as {path} has it, got {getattr(options, name)}"
            )
    held = states(model, optimizer)
    checkpoint.load(held, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=held["model"],
        optim_state_dict=held["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
    return max(steps)


if __name__ == "__main__":
    sys.exit(main())
