#!/usr/bin/env bash
# Everything to be done with a GPU at hand, in one command, offline: build, test, sanitize, measure. Results and logs
# go to $1. Needs python3 with torch (a CUDA build), pybind11, scikit-build-core, ninja, pytest, hypothesis; nvcc.
# bitsandbytes and PEFT are measured where they are installed; compute-sanitizer and ncu used where found.
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
step bench "$python" bench/run.py --device cuda --save "$out" --limit 240
step routes "$python" bench/run.py --device cuda --routes all --save "$out" --limit 120 \
  --shapes 4096x4096,14336x4096 --rows 1,2,4,8,16,32,64,128,256,512,1024,2048,4096
if command -v ncu >/dev/null; then
  step ncu env PYTHON="$python" bench/ncu.sh "$out"
else
  echo "== no ncu on PATH: nothing is profiled"
fi
exit $failed
