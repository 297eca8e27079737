"""The targets on a CPU: set for two threads of a machine with AMX, NF4 with double-quantised absmax and an
adapter of rank 16, bfloat16, as ratios within one run; elsewhere they are yardsticks all the same."""

from __future__ import annotations

from _results import DENSE
from _target import EXTRA, FLOOR, MEMORY, MIB, MICROSECONDS, ROOF, SPEED, WORST_ERROR, Target

EVAL, TRAINING = "bitsandbytes, eval mode", "bitsandbytes, training mode"
NO_ADAPTER, PLAIN = "fastlora, no adapter", "fastlora, plain absmax"
PEFT_BNB, PEFT_DENSE = "PEFT on bitsandbytes", "dense + LoRA (PEFT)"
ONE, EQUAL, LOOP = "fastlora, one adapter", "fastlora, equal ranks", "torch, a loop"
PEFT_BNB_EVAL = "PEFT on bitsandbytes, eval mode"
PATCH = "fastlora.patch(model)"


def _forward(m: int, least: float, reach: float, peer: str = DENSE, dtype: str = "bfloat16") -> Target:
    name = {DENSE: f"dense {dtype}", EVAL: "bitsandbytes eval"}[peer]
    return Target(
        f"forward, {dtype} x, m={m}, over {name}", "linear", "forward", SPEED, least, reach, peer, (m,), dtype
    )


def _dx(m: int, least: float, reach: float) -> Target:
    return Target(f"dx, m={m}, over dense dy·W", "backward", "dx", SPEED, least, reach, DENSE, (m,))


def _model() -> tuple[Target, ...]:
    """Of a model under PEFT on bitsandbytes, patched, over the same unpatched."""

    def target(op: str, unit: str, least: float, peer: str, m: int, mode: str = "") -> Target:
        return Target(
            f"{op}, patched, over unpatched{mode}", "trainers", op, unit, least, None, peer, (m,), ours=PATCH
        )

    return (
        target("training step of a model", SPEED, 2.0, PEFT_BNB, 512),
        target("token of an answer", SPEED, 5.0, PEFT_BNB, 1, " in training mode"),
        target("token of an answer", SPEED, 1.3, PEFT_BNB_EVAL, 1, " in eval mode"),
        target("peak of a model's training step", MEMORY, 1.0, PEFT_BNB, 512),
        target("peak of a model's answer", MEMORY, 1.0, PEFT_BNB_EVAL, 1, " in eval mode"),
    )


_DENSE_FROM_16 = (
    (16, 2.0, 3.0),
    (32, 2.0, 3.0),
    (64, 1.5, 2.0),
    (128, 1.5, 2.0),
    (512, 1.3, 1.7),
    (1024, 1.3, 1.7),
    (2048, 1.3, 1.7),
)

TARGETS = (
    _forward(1, 3.6, 5.0),
    _forward(1, 1.6, 1.6, EVAL),
    Target("forward, m=1, of the read roof", "linear", "forward", ROOF, 70, 90, m=(1,)),
    _forward(4, 2.5, 3.0),
    _forward(8, 2.0, 3.0),
    *(_forward(*numbers) for numbers in _DENSE_FROM_16),
    *(_dx(*numbers) for numbers in _DENSE_FROM_16),
    Target(
        "training step, m=1024, over PEFT on bitsandbytes",
        "train", "training step", SPEED, 2.0, 3.3, PEFT_BNB, (1024,),
    ),
    Target(
        "training step, m=1024, over PEFT on dense",
        "train", "training step", SPEED, 1.6, 2.5, PEFT_DENSE, (1024,),
    ),
    _forward(1, 3.0, 5.0, dtype="float32"),
    _forward(128, 1.0, 1.2, dtype="float32"),
    _forward(512, 1.0, 1.2, dtype="float32"),
    Target("quantise, over bitsandbytes", "quantize", "quantize", SPEED, 40, None, TRAINING),
    Target("quantise, over one read of the weight", "quantize", "quantize", FLOOR, 3.0, 1.5),
    Target(
        "dequantise to bfloat16, memory given, of the copy roof",
        "quantize", "dequantize, memory given", ROOF, 80, 90,
    ),
    *(
        Target(
            f"adapter of rank 16 on top of the base, m={m}",
            "linear", "forward", EXTRA, least, 2, NO_ADAPTER, (m,),
        )
        for m, least in ((1, 10), (16, 5), (128, 5), (1024, 5))
    ),
    *(
        Target(
            f"double quantisation on top of plain absmax, m={m}",
            "linear", "forward", EXTRA, 3, 0, PLAIN, (m,),
        )
        for m in (1, 16, 128, 1024)
    ),
    Target(
        "64 rows, an adapter of rank 16 each, of one read of the adapters",
        "segmented", "term, an adapter a row", ROOF, 70, 85, m=(64,),
    ),
    *(
        Target(
            f"layer, 64 rows, an adapter each, over {peer}",
            "segmented", "layer, an adapter a row", SPEED, 5, None, peer, (64,),
        )
        for peer in (PEFT_DENSE, PEFT_BNB)
    ),
    Target(
        "layer, 1024 rows of 8 adapters, on top of one adapter",
        "segmented", "layer, 8 adapters", EXTRA, 8, 3, ONE, (1024,),
    ),
    Target(
        "adapters of ranks 8 to 64, on top of equal ranks of the same sum",
        "segmented", "term, ranks 8 to 64", EXTRA, 15, 5, EQUAL, (64, 1024),
    ),
    Target(
        "training step of the term, 1024 rows of 8 adapters, over a loop in torch",
        "segmented", "training step of the term, 8 adapters", SPEED, 3, None, LOOP, (1024,),
    ),
    Target(
        "forward at the AVX2 level, m=1, over dense capped to AVX2",
        "linear", "forward", SPEED, 2.0, 3.0, DENSE, (1,), level="avx2",
    ),
    *_model(),
    Target(
        "AdamW step, float32, over torch's default AdamW",
        "optimizer", "AdamW step", SPEED, 2.0, None, "torch AdamW", dtype="float32",
    ),
    Target("call of a 64 x 64 layer, inference", "overhead", "call", MICROSECONDS, 8, 5, ours="QLinear"),
    Target("scratch memory a thread, any shape", "memory", "scratch a thread", MIB, 4),
    Target("error of forward, over dequantise + dense", "linear", "forward", WORST_ERROR, 1.0),
    Target("error of dx, over dequantise + dense", "backward", "dx", WORST_ERROR, 1.0),
)  # fmt: skip
