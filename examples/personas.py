"""Three adapters trained together on one 4-bit base, then answering in one batch; nothing is downloaded.

    python examples/personas.py            # about two minutes on two cores
    python examples/personas.py --quick    # the same in seconds, on a model too small to be any good

A byte-level transformer is first trained on the standard library's Python source. Its linear layers become
NF4, and get three adapters of unlike ranks: one is to speak English, one the names of Unicode, one calendars.
Every training batch holds windows of all three texts, each row with its own adapter; each adapter has its own
loss, its own group in the optimiser, its own learning rate. At the end one batch asks all of them, and the
bare base. The exit code is 0 only if each adapter lowered the loss of its text and is the best of the three
at it, the batch says what each says alone, and the files give the same bits back.
"""

from __future__ import annotations

import argparse
import calendar
import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _report import console, loss_table, plot_losses
from _subjects import byte_subject
from _text import Domain, english, python_source, split, unicode_names
from _tiny_lm import Config
from _training import History, Subject, even_windows, held_out_loss, progress_bar, random_windows, train
from rich.markup import escape
from torch import Tensor, nn
from torch.nn import functional

import fastlora

Tokens = dict[str, tuple[Tensor, Tensor]]  # by domain: to train on, held out


@dataclass(frozen=True)
class Persona:
    """An adapter, what it learns from, and what it is asked: prompts of one length, as a batch has."""

    name: str
    domain: Domain
    rank: int
    rate: float  # the learning rate, as a share of the plan's
    prompt: str


@dataclass(frozen=True)
class Plan:
    """How long everything takes: sizes and step counts."""

    config: Config
    text: int | None  # characters kept of each domain; None: all
    pretrain_steps: int
    pretrain_rows: int
    pretrain_rate: float
    steps: int
    rate: float
    rows: int  # of each persona in a batch
    eval_windows: int
    answer: int  # tokens


FULL = Plan(
    config=Config(),
    text=None,
    pretrain_steps=500,
    pretrain_rows=4,
    pretrain_rate=2e-3,
    steps=160,
    rate=3e-3,
    rows=2,
    eval_windows=32,
    answer=72,
)
QUICK = Plan(
    config=Config(width=64, layers=2, heads=2, hidden=192, context=64),
    text=300_000,
    pretrain_steps=60,
    pretrain_rows=8,
    pretrain_rate=4e-3,
    steps=60,
    rate=1e-2,
    rows=4,
    eval_windows=16,
    answer=24,
)


def calendars(*, seed: int, limit: int | None = None) -> Domain:
    """The months of four centuries as `calendar` prints them (about 0.7 MB)."""
    months = [calendar.TextCalendar().formatmonth(y, m) for y in range(1700, 2100) for m in range(1, 13)]
    return split("Calendars", months, "\n    May ", seed, limit, held_out=0.1)


def main() -> int:
    options = parse_arguments()
    begin = time.perf_counter()
    plan = QUICK if options.quick else FULL
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"fastlora {fastlora.__version__} | torch {torch.__version__} | level {fastlora.current_isa()} | "
        f"{torch.get_num_threads()} threads | seed {options.seed}"
    )
    source, *texts = (
        make(seed=options.seed, limit=plan.text)
        for make in (python_source, english, unicode_names, calendars)
    )
    personas = [
        Persona("english", texts[0], 16, 0.7, "The obje"),
        Persona("unicode", texts[1], 8, 1.0, "\nLATIN S"),
        Persona("calendar", texts[2], 12, 0.7, "\n    May"),
    ]
    subject = byte_subject(plan.config)
    tokens = {d.name: (subject.encode(d.train), subject.encode(d.held_out)) for d in (source, *texts)}
    pretrain(subject, tokens[source.name], plan, options.seed)
    report = fastlora.convert(subject.model, rank=0)
    console.print(str(report), markup=False, soft_wrap=True)

    table = [("NF4", losses(subject, tokens, texts, plan))]
    for layer in layers_of(subject.model):
        for persona in personas:
            layer.add_adapter(persona.name, persona.rank, alpha=2 * persona.rank)
    histories = train_together(subject, tokens, personas, plan, options.seed)
    for persona in personas:
        wear(subject.model, persona.name)
        table.append((f"NF4 + {persona.name} (rank {persona.rank})", losses(subject, tokens, texts, plan)))
        fastlora.save_adapter(subject.model, options.out / persona.name, name=persona.name)
    console.print(loss_table(table))
    plot_losses(histories, options.out / "loss.png")

    names = [None, *(persona.name for persona in personas)]
    asked = [(name, persona.prompt) for persona in personas for name in (None, persona.name)]
    for (name, _), text in zip(asked, answer(subject, asked, plan.answer, options.seed), strict=True):
        line = escape(text.strip("\n").replace("\n", " ⏎ "))
        console.print(f"[dim]{name or 'NF4':>16} │[/dim] {line}", soft_wrap=True)

    by_text = dict(zip(names, (row for _, row in table), strict=True))
    lowered = all(by_text[p.name][p.domain.name] < by_text[None][p.domain.name] for p in personas)
    best = all(min(names, key=lambda n: by_text[n][p.domain.name]) == p.name for p in personas)
    apart = distance_to_alone(subject, tokens, personas)
    same = loads_back(subject.model, personas, options.out)
    console.print(f"wrote {options.out}/: {', '.join(p.name for p in personas)}, loss.png")
    for claim, holds in (
        ("training together lowered the held-out loss of every adapter's own text", lowered),
        ("each adapter is the best of them at its own text", best),
        (f"in a mixed batch each says what it says alone (logits apart by {apart:.1e})", apart < 2e-2),
        ("the files give every adapter back, bit for bit", same),
    ):
        console.print(f"[green]yes[/green]  {claim}" if holds else f"[bold red]NO[/bold red]   {claim}")
    console.print(f"{time.perf_counter() - begin:.0f} s in all")
    return 0 if lowered and best and apart < 2e-2 and same else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out/personas"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    return parser.parse_args()


def layers_of(model: nn.Module) -> list[fastlora.QLinear]:
    return [m for m in model.modules() if isinstance(m, fastlora.QLinear)]


def wear(model: nn.Module, name: str | None) -> None:
    """One adapter for all rows; None: the bare base."""
    for layer in layers_of(model):
        layer.set_adapter(name)


def pretrain(subject: Subject, tokens: tuple[Tensor, Tensor], plan: Plan, seed: int) -> None:
    train(
        subject, *tokens, label="pre-training: Python source", steps=plan.pretrain_steps,
        rows=plan.pretrain_rows,
        lr=plan.pretrain_rate, weight_decay=0.05, eval_windows=plan.eval_windows, seed=seed,
    )  # fmt: skip


def losses(subject: Subject, tokens: Tokens, texts: list[Domain], plan: Plan) -> dict[str, float]:
    return {d.name: held_out_loss(subject, tokens[d.name][1], count=plan.eval_windows) for d in texts}


def train_together(
    subject: Subject, tokens: Tokens, personas: list[Persona], plan: Plan, seed: int
) -> list[History]:
    """One forward and one backward pass a step for all adapters: rows of the batch go to their own."""
    parameters = {
        p.name: [t for layer in layers_of(subject.model) for t in layer.adapters[p.name].parameters()]
        for p in personas
    }
    groups = [{"params": parameters[p.name], "lr": plan.rate * p.rate} for p in personas]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.02, 1 - step / plan.steps))
    generator = torch.Generator().manual_seed(seed)
    histories = {p.name: History(f"{p.name}, rank {p.rank}") for p in personas}

    def measure(step: int) -> None:
        for p in personas:
            wear(subject.model, p.name)
            loss = held_out_loss(subject, tokens[p.domain.name][1], count=plan.eval_windows)
            histories[p.name].held_out.append((step, loss))

    measure(0)
    names = [p.name for p in personas for _ in range(plan.rows)]
    with progress_bar() as bar:
        task = bar.add_task("three adapters together", total=plan.steps, loss=0.0)
        for step in range(1, plan.steps + 1):
            subject.model.train()
            windows = [
                random_windows(tokens[p.domain.name][0], plan.rows, subject.context, generator)
                for p in personas
            ]
            batch = torch.cat(windows)
            with fastlora.adapters(subject.model, names):
                logits = subject.logits(batch[:, :-1])
            each = functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
            own = each.mean(1).view(len(personas), plan.rows).mean(1)  # a loss an adapter
            optimizer.zero_grad()
            own.sum().backward()  # none of them reaches another's parameters
            for mine in parameters.values():
                nn.utils.clip_grad_norm_(mine, 1.0)
            optimizer.step()
            schedule.step()
            for p, loss in zip(personas, own.tolist(), strict=True):
                histories[p.name].train.append(loss)
            bar.update(task, completed=step, loss=own.mean().item())
            if step in (plan.steps // 2, plan.steps):
                measure(step)
    return list(histories.values())


@torch.no_grad()
def answer(
    subject: Subject, asked: list[tuple[str | None, str]], tokens: int, seed: int, temperature: float = 0.6
) -> list[str]:
    """`tokens` more tokens after each prompt, all prompts in one batch, each by its own adapter."""
    subject.model.eval()
    generator = torch.Generator().manual_seed(seed)
    text = torch.stack([subject.encode(prompt).long() for _, prompt in asked])
    with fastlora.adapters(subject.model, [name for name, _ in asked]):
        for _ in range(tokens):
            logits = subject.logits(text[:, -subject.context :])[:, -1]
            choice = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            text = torch.cat((text, choice), dim=1)
    return [subject.decode(row.tolist()) for row in text]


@torch.no_grad()
def distance_to_alone(subject: Subject, tokens: Tokens, personas: list[Persona]) -> float:
    """The largest relative distance between a row's logits in a mixed batch and those of its adapter
    alone."""
    subject.model.eval()
    rows = {p.name: even_windows(tokens[p.domain.name][1], 2, subject.context)[:, :-1] for p in personas}
    with fastlora.adapters(subject.model, [name for name, part in rows.items() for _ in part]):
        mixed = subject.logits(torch.cat(list(rows.values()))).split([len(part) for part in rows.values()])
    found = []
    for (name, part), together in zip(rows.items(), mixed, strict=True):
        wear(subject.model, name)
        alone = subject.logits(part)
        found.append(((together - alone).norm() / alone.norm()).item())
    return max(found)


def loads_back(model: nn.Module, personas: list[Persona], out: Path) -> bool:
    """Whether the files, read into the bare base, are the adapters that were written."""
    bare = copy.deepcopy(model)
    wear(bare, None)
    for layer in layers_of(bare):
        for persona in personas:
            layer.delete_adapter(persona.name)
    for persona in personas:
        fastlora.load_adapter(bare, out / persona.name, name=persona.name)
    before, after = model.state_dict(), bare.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


if __name__ == "__main__":
    sys.exit(main())
