"""One call of the layer on the current CUDA device, between the profiler's start and stop.

    ncu --profile-from-start off python bench/one_call.py forward 14336x4096 1
    python bench/one_call.py dx 4096x4096 512 --route tile

bfloat16, double-quantised, an adapter of rank 16; the call comes after three like it, and says which route it
takes.
"""

from __future__ import annotations

import argparse

import _device
import _options
import _routes
import torch
from _problem import Problem
from peers.fastlora_nf4 import Fastlora


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", choices=("forward", "dx"))
    parser.add_argument("shape", type=_options.shape, help="n x k, as 4096x4096")
    parser.add_argument("rows", type=_options.count)
    parser.add_argument("--route", choices=("auto", *_options.ROUTES), default="auto")
    options = parser.parse_args()
    device = _device.Cuda()
    refused = device.refuse()
    if refused:
        parser.error(refused)
    problem = Problem(*options.shape, 16, "bfloat16", device.where)
    layer = Fastlora(problem)
    forward = options.op == "forward"
    operand = (problem.activation if forward else problem.gradient)(options.rows)
    call = layer.forward if forward else layer.grad_input
    with _routes.use_route(options.route):
        for _ in range(3):
            call(operand)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call(operand)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    choice = _routes.choice(device.kernels, not forward, options.rows, problem, layer.rank, options.route)
    n, k = options.shape
    print(f"{options.op} {n}x{k} m {options.rows}: {choice}")


if __name__ == "__main__":
    main()
