"""A small language model under PEFT, a process a contender: its training step, its answer, and how far its
memory grew.

A process of its own, because bitsandbytes' evaluation changes weights for good, patch_bitsandbytes() is for a
whole process, and peaks are only comparable where nothing else ran before.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import time
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import _memory
import torch
from torch import nn

PEFT_DENSE, PEFT_BNB = "dense + LoRA (PEFT)", "PEFT on bitsandbytes"
PEFT_BNB_EVAL = "PEFT on bitsandbytes, eval mode"
PATCHED, PATCHED_BNB = "fastlora.patch(model)", "fastlora.patch_bitsandbytes()"
#: Not timed: float32 arithmetic on the 4-bit weights, dequantised by bitsandbytes, and on the dense ones.
EXACT_BNB, EXACT_DENSE = "float32 on bitsandbytes' weights", "float32 on dense weights"
#: name: the contender of the other suites that must be wanted for it.
REGISTRY = {
    PEFT_DENSE: PEFT_DENSE,
    PEFT_BNB: PEFT_BNB,
    PEFT_BNB_EVAL: PEFT_BNB,
    PATCHED_BNB: "fastlora",
    PATCHED: "fastlora",
}
#: What every process has imported; not fastlora, which runs serially in a child that was forked after it.
_COMMON = ["torch", "transformers.models.llama.modeling_llama", "peft", "bitsandbytes"]
_SCALE = 2  # alpha over rank


@dataclass(frozen=True)
class Sizes:
    """A Llama's, whose heads are of 64, four to a key and value where the width allows it. Widths are
    multiples of 64: bitsandbytes dequantises others wrongly. tokens: in a step; prompt, answer: in tokens."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    tokens: int
    rank: int
    dtype: torch.dtype
    prompt: int = 16
    answer: int = 16

    def config(self) -> Any:
        import transformers

        heads = max(self.hidden // 64, 1)
        return transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 4 if heads % 4 == 0 else heads,
            max_position_embeddings=max(self.tokens, self.prompt + self.answer),
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            tie_word_embeddings=False,
        )


class Work:
    """A contender in its process."""

    def __init__(self, name: str, sizes: Sizes) -> None:
        self.name, self.sizes = name, sizes
        self.before = _memory.settled_bytes()
        exact = name in (EXACT_BNB, EXACT_DENSE)
        dtype = torch.float32 if exact else sizes.dtype
        self.model = _model(sizes, name not in (PEFT_DENSE, EXACT_DENSE), exact).to(dtype)
        if name == PATCHED_BNB:
            import fastlora

            fastlora.patch_bitsandbytes()
        elif name == PATCHED:
            import fastlora

            with contextlib.redirect_stdout(io.StringIO()):  # its report
                fastlora.patch(self.model)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=1e-4)
        drawn = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(sizes.vocabulary, (1, sizes.tokens), generator=drawn)
        self.prompt = self.tokens[:, : sizes.prompt]
        self.answers_in_training = name == PEFT_BNB

    def check(self) -> dict[str, Any]:
        """The loss, the adapters' gradients as one vector, the logits that follow the prompt. Nothing has
        learned by then."""
        self.model.train()
        loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        gradients = [p.grad.float().flatten() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad()
        self.model.train(self.answers_in_training)
        with torch.no_grad():
            logits = self.model(input_ids=self.prompt).logits[:, -1].float()
        return {
            "loss": loss.item(),
            "gradients": torch.cat(gradients).numpy(),
            "logits": logits.numpy(),
            "weight_bytes": _bytes(self.model),
            "weights": _weights(self.model),
        }

    def step(self) -> None:
        if not self.model.training:
            self.model.train()
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def answer(self) -> None:
        if self.model.training != self.answers_in_training:
            self.model.train(self.answers_in_training)
        self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            do_sample=False,
            max_new_tokens=self.sizes.answer,
        )

    def peak_of_step(self) -> int | None:
        return _memory.peak_growth(self.step, self.before)

    def peak_of_answer(self) -> int | None:
        return _memory.peak_growth(self.answer, self.before)


def _model(sizes: Sizes, in_4_bits: bool, exact: bool) -> nn.Module:
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(sizes.config(), dtype=sizes.dtype)
    if in_4_bits:
        for name, module in list(model.model.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(model.model.get_submodule(parent), child, _quantised(module, sizes.dtype, exact))
        model.is_loaded_in_4bit = not exact
    torch.manual_seed(0)
    options = {"r": sizes.rank, "lora_alpha": _SCALE * sizes.rank, "target_modules": "all-linear"}
    return peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    )


def _quantised(linear: nn.Linear, dtype: torch.dtype, exact: bool) -> nn.Module:
    import bitsandbytes

    n, k = linear.weight.shape
    layer = bitsandbytes.nn.Linear4bit(k, n, False, dtype, quant_type="nf4", device="meta")
    layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data, quant_type="nf4", module=layer)
    layer = layer.to("cpu")
    if not exact:
        return layer
    layer.weight.quant_state.dtype = torch.float32
    dense = nn.Linear(k, n, bias=False, device="meta")
    dense.weight = nn.Parameter(
        bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    )
    return dense


def _bases(model: nn.Module) -> list[nn.Module]:
    """The layers that have adapters."""
    return [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]


def _bytes(model: nn.Module) -> int:
    """Of their weights, scales included."""
    total = 0
    for base in _bases(model):
        state = getattr(base.weight, "quant_state", None)
        total += base.weight.nbytes
        if state is not None:
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


def _weights(model: nn.Module) -> int:
    return sum(base.in_features * base.out_features for base in _bases(model))


# --- the processes ------------------------------------------------------------------------------------------


def _serve(pipe: Any, name: str, sizes: Sizes, threads: int) -> None:
    """Answers each command with (seconds, result), or with an error's text."""
    warnings.simplefilter("ignore")  # what libraries deprecate
    torch.set_num_threads(threads)
    work: Work | None = None
    while True:
        try:
            command = pipe.recv()
        except EOFError:
            return
        try:
            if work is None:
                work = Work(name, sizes)
            begin = time.perf_counter()
            result = getattr(work, command)()
            pipe.send((time.perf_counter() - begin, result, ""))
        except Exception as error:
            text = str(error).strip().partition("\n")[0]
            pipe.send((0.0, None, text or type(error).__name__))


class Contender:
    """A process, as suites.Context wants a contender. It builds its model at the first command."""

    route = ""
    checked: dict[str, Any]  # what its process answered to "check"
    errors: dict[str, float]  # of some of that

    def __init__(self, name: str, sizes: Sizes, threads: int) -> None:
        self.name = name
        method = multiprocessing.get_context("forkserver")
        method.set_forkserver_preload(_COMMON)
        self._pipe, theirs = method.Pipe()
        process = method.Process(target=_serve, args=(theirs, name, sizes, threads), daemon=True)
        process.start()
        theirs.close()
        self.close = weakref.finalize(self, _stop, self._pipe, process)

    def run(self, command: str) -> tuple[float, Any]:
        """(seconds, what came out) of one of Work's methods. RuntimeError with what went wrong there."""
        try:
            self._pipe.send(command)
            seconds, result, why = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError("its process ended") from None
        if why:
            raise RuntimeError(why)
        return seconds, result

    def weight_bytes(self) -> int:
        return self.checked["weight_bytes"]


def _stop(pipe: Any, process: Any) -> None:
    pipe.close()
    process.join(10)
    if process.is_alive():
        process.kill()


def distance(found: Any, want: Any) -> float:
    """Relative, Euclidean, of two arrays."""
    return ((torch.from_numpy(found) - torch.from_numpy(want)).norm() / torch.from_numpy(want).norm()).item()
