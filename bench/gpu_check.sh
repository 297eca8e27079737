#!/usr/bin/env bash
# Everything to be done with a GPU at hand, in one command, offline: build, test, sanitize, measure. Results and logs
# go to $1. Needs python3 with torch (a CUDA build), pybind11, scikit-build-core, ninja, pytest, hypothesis; nvcc.
# bitsandbytes is measured where it is installed, compute-sanitizer used where it is found.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?expected a folder for the results}
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0

step() {
  local name=$1 begin=$SECONDS
  shift
  echo "== $name"
  "$@" >"$out/$name.log" 2>&1
  local status=$?
  tail -n 5 "$out/$name.log"
  echo "== $name: exit $status after $((SECONDS - begin)) s"
  [ $status -eq 0 ] || failed=1
}

arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
[ "$arch" = 90 ] && arch=90a
step build "$python" -m pip install --no-build-isolation --no-deps --force-reinstall . \
  --config-settings=cmake.define.FASTLORA_CUDA=ON --config-settings=cmake.define.FASTLORA_CUDA_ARCHS="$arch"
[ $failed -eq 0 ] || exit 1
step tests "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py tests/test_nf4_levels.py -k "cuda and not emulated"
if command -v compute-sanitizer >/dev/null; then
  for check in memcheck racecheck; do
    step "$check" compute-sanitizer --tool "$check" --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider \
      tests/test_nf4_levels.py -k "cuda and not emulated and (every_block_size or ties)"
  done
else
  echo "== no compute-sanitizer on PATH: memcheck and racecheck not run"
fi
step bench "$python" bench/gpu.py --out "$out"
exit $failed
