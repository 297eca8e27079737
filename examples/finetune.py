"""A 4-bit language model, fine-tuned on two kinds of text by fastlora's own kernels; nothing is downloaded.

    make demo                                   # about two minutes on two cores
    python examples/finetune.py --quick         # the same in seconds, on a model too small to be any good
    python examples/finetune.py --model FOLDER  # a local Hugging Face causal language model instead

Without --model, a byte-level transformer is first trained on the standard library's Python source. Then: its
linear layers become NF4 with low-rank adapters; one adapter learns English, another the names of Unicode; the
two are switched on the one base; all is saved and loaded by a new process, whose outputs must be the same
bits. The exit code is 0 only if both adapters lowered the held-out loss and the bits agree.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from _layer_timing import compare_layers
from _report import console, layer_table, loss_table, memory_table, plot_losses
from _subjects import byte_subject, describe, hugging_face_subject, rebuild
from _text import Domain, english, python_source, unicode_names
from _tiny_lm import Config
from _training import History, Subject, even_windows, fingerprint, held_out_loss, sample, train
from rich.markup import escape
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastlora


@dataclass(frozen=True)
class Plan:
    """How long everything takes: sizes and step counts."""

    config: Config
    text: int | None  # characters kept of each domain; None: all
    pretrain_steps: int
    pretrain_rate: float
    finetune_steps: int
    finetune_rate: float
    rows: int
    eval_windows: int
    sample_tokens: int
    layer: int
    layer_rows: int
    rounds: int


FULL = Plan(
    config=Config(),
    text=None,
    pretrain_steps=600,
    pretrain_rate=2e-3,
    finetune_steps=120,
    finetune_rate=3e-3,
    rows=4,
    eval_windows=48,
    sample_tokens=64,
    layer=4096,
    layer_rows=512,
    rounds=9,
)
QUICK = Plan(
    config=Config(width=64, layers=2, heads=2, hidden=192, context=64),
    text=300_000,
    pretrain_steps=60,
    pretrain_rate=4e-3,
    finetune_steps=40,
    finetune_rate=1e-2,
    rows=8,
    eval_windows=16,
    sample_tokens=16,
    layer=256,
    layer_rows=32,
    rounds=3,
)
HUGGING_FACE = replace(FULL, text=400_000, finetune_steps=30, finetune_rate=3e-4, eval_windows=16)


def main() -> int:
    options = parse_arguments()
    if options.verify is not None:
        return verify(options.verify)
    begin = time.perf_counter()
    plan = QUICK if options.quick else FULL if options.model is None else HUGGING_FACE
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"fastlora {fastlora.__version__} | torch {torch.__version__} | level {fastlora.current_isa()} | "
        f"{torch.get_num_threads()} threads | seed {options.seed}"
    )
    domains = [make(seed=options.seed, limit=plan.text) for make in (python_source, english, unicode_names)]
    if options.model is None:
        subject = byte_subject(plan.config)
    else:
        subject = hugging_face_subject(options.model, context=plan.config.context)
    tokens = {d.name: (subject.encode(d.train), subject.encode(d.held_out)) for d in domains}
    histories: list[History] = []
    if options.model is None:
        histories.append(run_training(subject, tokens, domains[0], plan, options.seed, adapter=False))

    def losses() -> dict[str, float]:
        return {d.name: held_out_loss(subject, tokens[d.name][1], count=plan.eval_windows) for d in domains}

    table = [("dense", losses())]
    report = fastlora.convert(subject.model, rank=16, alpha=32)
    console.print(str(report), markup=False, soft_wrap=True)
    console.print(memory_table(subject.model))
    table.append(("NF4", losses()))

    # Two adapters, one after the other, on the same 4-bit base; each starts from zero.
    samples = {"NF4": [draw(subject, d, plan, options.seed) for d in domains[1:]]}
    improved, trained = True, {}
    for domain in domains[1:]:
        reset_adapters(subject)
        history = run_training(subject, tokens, domain, plan, options.seed, adapter=True)
        histories.append(history)
        trained[domain.name] = history.held_out[-1][1]
        improved &= history.held_out[-1][1] < history.held_out[0][1]
        fastlora.save_adapter(subject.model, adapter_folder(options.out, domain.name))

    # Switching: each adapter comes back from its files and measures exactly what it measured after training.
    prints, switched = {}, True
    for domain in domains[1:]:
        fastlora.load_adapter(subject.model, adapter_folder(options.out, domain.name))
        table.append((f"NF4 + {domain.name} adapter", losses()))
        switched &= table[-1][1][domain.name] == trained[domain.name]
        samples[domain.name] = [draw(subject, domain, plan, options.seed)]
        prints[domain.name] = fingerprint(subject, check_tokens(subject, tokens[domain.name][1]))
    console.print(loss_table(table))
    show_samples(domains[1:], samples)

    save_run(options, subject, {d.name: check_tokens(subject, tokens[d.name][1]) for d in domains[1:]})
    same = reload_in_new_process(options.out, prints)
    plot_losses(histories, options.out / "loss.png")

    times, remark = compare_layers(
        size=plan.layer, rows=plan.layer_rows, rank=16, rounds=plan.rounds, seed=options.seed
    )
    console.print(layer_table(times, size=plan.layer, rows=plan.layer_rows, threads=torch.get_num_threads()))
    if remark:
        console.print(remark)
    console.print(f"wrote {options.out}/: adapters, the 4-bit base, loss.png")
    for claim, holds in (
        ("fine-tuning lowered the held-out loss of both domains", improved),
        ("switching adapters gives back exactly the loss each had after training", switched),
        ("a new process that loads the files computes the same bits", same),
    ):
        console.print(f"[green]yes[/green]  {claim}" if holds else f"[bold red]NO[/bold red]   {claim}")
    console.print(f"{time.perf_counter() - begin:.0f} s in all")
    return 0 if improved and switched and same else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="a local Hugging Face causal LM to fine-tune"
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="default: demo_out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--verify", type=Path, help=argparse.SUPPRESS)  # what the new process is started with
    return parser.parse_args()


def run_training(
    subject: Subject,
    tokens: dict[str, tuple[Tensor, Tensor]],
    domain: Domain,
    plan: Plan,
    seed: int,
    *,
    adapter: bool,
) -> History:
    """All of a dense model, or the adapters of a converted one."""
    data, held_out = tokens[domain.name]
    return train(
        subject,
        data,
        held_out,
        label=f"{'adapter' if adapter else 'pre-training'}: {domain.name}",
        steps=plan.finetune_steps if adapter else plan.pretrain_steps,
        rows=plan.rows,
        lr=plan.finetune_rate if adapter else plan.pretrain_rate,
        weight_decay=0.0 if adapter else 0.05,
        eval_windows=plan.eval_windows,
        seed=seed,
    )


def reset_adapters(subject: Subject) -> None:
    for module in subject.model.modules():
        if isinstance(module, fastlora.QLinear):
            module.reset_adapter()


def adapter_folder(out: Path, domain: str) -> Path:
    return out / "adapters" / domain.lower().replace(" ", "_")


def check_tokens(subject: Subject, held_out: Tensor) -> Tensor:
    """The input whose output bits are compared: int64 (2, context)."""
    return even_windows(held_out, 2, subject.context)[:, :-1].contiguous()


def draw(subject: Subject, domain: Domain, plan: Plan, seed: int) -> str:
    return sample(subject, domain.prompt, tokens=plan.sample_tokens, seed=seed)


def show_samples(domains: list[Domain], samples: dict[str, list[str]]) -> None:
    for i, domain in enumerate(domains):
        for name, text in (("NF4", samples["NF4"][i]), (f"+ {domain.name}", samples[domain.name][0])):
            line = escape(text.strip("\n").replace("\n", " ⏎ "))
            console.print(f"[dim]{name:>16} │[/dim] {line}", soft_wrap=True)


def save_run(options: argparse.Namespace, subject: Subject, checks: dict[str, Tensor]) -> None:
    """All that a new process needs besides the adapters: the base in 4 bits, and what to compute with it."""
    if options.model is None:
        state = subject.model.state_dict()
        save_file({k: v for k, v in state.items() if "lora_" not in k}, options.out / "base.safetensors")
    save_file(checks, options.out / "check.safetensors")
    description = describe(subject, options.model) | {"threads": torch.get_num_threads()}
    (options.out / "run.json").write_text(json.dumps(description, indent=2) + "\n")


def reload_in_new_process(out: Path, expected: dict[str, str]) -> bool:
    command = [sys.executable, __file__, "--verify", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        console.print(escape(done.stderr))
        return False
    found = json.loads(done.stdout.splitlines()[-1])
    for name, digest in expected.items():
        console.print(
            f"logits, {name}: SHA-256 {digest[:16]} here, {found.get(name, 'none')[:16]} in a new process",
            soft_wrap=True,
        )
    return found == expected


def verify(out: Path) -> int:
    """In the new process: rebuild the model from files alone and print its fingerprint with each adapter."""
    description = json.loads((out / "run.json").read_text())
    torch.set_num_threads(description["threads"])
    subject = rebuild(description)
    fastlora.convert(subject.model, rank=16, alpha=32, progress=False)
    if description["kind"] == "bytes":
        missing, unexpected = subject.model.load_state_dict(load_file(out / "base.safetensors"), strict=False)
        if unexpected or any("lora_" not in name for name in missing):
            raise RuntimeError(f"verify: expected base.safetensors to fit, got {missing=} {unexpected=}")
    prints = {}
    for name, tokens in load_file(out / "check.safetensors").items():
        fastlora.load_adapter(subject.model, adapter_folder(out, name))
        prints[name] = fingerprint(subject, tokens)
    print(json.dumps(prints))
    return 0


if __name__ == "__main__":
    sys.exit(main())
