"""The cost model of the CUDA kernels, and that docs/cuda_kernels.md shows what it gives."""

from __future__ import annotations

import pytest

pytest.importorskip("fastlora._emulator", reason="this build holds no emulator")

import _cuda_model as model
import _cuda_tables
import cuda_model


def test_docs_show_what_the_model_gives() -> None:
    text = _cuda_tables.DOCS.read_text(encoding="utf-8")
    shown = text[text.index(cuda_model.BEGIN) + len(cuda_model.BEGIN) : text.index(cuda_model.END)]
    assert shown.strip() == cuda_model.text(), "make cuda-model ARGS=--write"


@pytest.mark.parametrize("kernel", model.kernels(), ids=lambda it: it.name)
def test_every_main_loop_has_a_cost_where_it_runs(kernel: model.Kernel) -> None:
    for gpu in model.GPUS:
        step = model.step(kernel, gpu)
        assert (step is None) == (kernel.route == "warpgroup" and not gpu.group_products)
        if step is not None:
            assert min(step.tensor, step.issue, step.shared) > 0
            # The same products as the tile has weights and rows.
            rate = gpu.group_products if kernel.route == "warpgroup" else gpu.products
            assert step.tensor * rate == kernel.outer * kernel.columns * step.depth


@pytest.mark.parametrize("gpu", model.GPUS, ids=lambda it: it.name)
@pytest.mark.parametrize("grad", [False, True])
def test_a_call_takes_no_less_than_its_bytes_and_products(gpu: model.Gpu, grad: bool) -> None:
    for m in (1, 64, 1024, 8192):
        found = model.predict(gpu, grad, m, 4096, 14336)
        assert found is not None
        assert found.us > model.moved_bytes(m, 4096, 14336) / gpu.copy / 1e6
        rate = max(gpu.products, gpu.group_products) * gpu.processors * gpu.ghz * 1e3
        assert found.us > m * 4096 * 14336 / rate
    assert model.predict(gpu, grad, 64, 4096, 14336, "decode") is None
