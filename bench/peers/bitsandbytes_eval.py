"""bitsandbytes' Linear4bit in eval mode: it repacks the weight for its fused CPU kernel at the first call and
cannot train afterwards."""

from __future__ import annotations

from peers.bitsandbytes_nf4 import BitsandbytesTraining


class BitsandbytesEval(BitsandbytesTraining):
    name = "bitsandbytes, eval mode"
    operations = frozenset({"forward"})
    training = False
