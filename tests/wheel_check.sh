#!/usr/bin/env bash
# Install the newest wheel of dist/ beside another torch, in an environment of its own, and run the tests there:
#   tests/wheel_check.sh 2.6.0 [pytest's arguments]
# PYTHON=python3 makes the environment, build/wheel-check/<torch>-<python>. Pins of constraints.txt hold but for torch
# and what each torch wants in versions of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
torch=${1:?the version of torch, as 2.6.0}
shift
unset PYTHONPATH PIP_CONSTRAINT PIP_BUILD_CONSTRAINT

tag=$("${PYTHON:-python3}" -c 'import sys; print(f"cp{sys.version_info[0]}{sys.version_info[1]}")')
wheel=$(ls -t dist/fastlora-*-"$tag"-*.whl 2>/dev/null | head -1)
[[ -n $wheel ]] || { echo "wheel_check: expected a wheel for $tag in dist/, got none; run make wheel" >&2; exit 2; }

home=build/wheel-check/$torch-$tag
"${PYTHON:-python3}" -m venv "$home"
grep -vE '^(torch|torchao|sympy|networkx|setuptools|filelock|fsspec)==' constraints.txt > "$home/constraints.txt"
"$home/bin/python" -m pip install --quiet --no-cache-dir --constraint "$home/constraints.txt" "torch==$torch" "$wheel[test,trainers,demo]"
# Of the same version as one that may be there already: the wheel itself, always.
"$home/bin/python" -m pip install --quiet --no-cache-dir --no-deps --force-reinstall "$wheel"
"$home/bin/python" - <<PYTHON
import pathlib, sys, fastlora, torch
assert pathlib.Path(fastlora.__file__).is_relative_to(sys.prefix), f"not the wheel: {fastlora.__file__}"
print(f"$wheel in {fastlora.__file__}, torch {torch.__version__}")
PYTHON
"$home/bin/python" -m pytest --numprocesses 2 --dist loadfile "$@"
