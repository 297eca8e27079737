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
# Without this project's own options of pytest, which refuse to run where pytest-timeout is not installed.
pytest=("$python" -m pytest -q -p no:cacheprovider -o addopts=-ra)
on_device="cuda and not emulated"
step tests "${pytest[@]}" -k "$on_device" tests/test_cuda.py tests/test_nf4_levels.py tests/test_nf4_linear.py \
  tests/test_nf4_linear_grad_input.py tests/test_lora_gradients.py tests/test_lora_dropout.py tests/test_autograd.py \
  tests/test_qlinear.py tests/test_adamw.py tests/test_cuda_optimizers.py
if command -v compute-sanitizer >/dev/null; then
  # Every kernel a few times, on small shapes. Of memory that torch keeps for later nothing is known: every tensor
  # gets its own. And torch's kernels are left alone.
  some="every_block_size or ties or any_address or every_width_of_a_tile or same_bits_on_every_run or largest_sums"
  some="$some or backward_matches or grad_a_matches or grad_b_and or 8bit_bits"
  for check in memcheck racecheck initcheck synccheck; do
    step "$check" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$check" --kernel-regex kns=fastlora \
      --error-exitcode 9 "${pytest[@]}" -k "$on_device and ($some)" tests/test_nf4_levels.py tests/test_nf4_linear.py \
      tests/test_nf4_linear_grad_input.py tests/test_lora_gradients.py tests/test_lora_dropout.py tests/test_adamw.py
  done
else
  echo "== no compute-sanitizer on PATH: memcheck, racecheck, initcheck and synccheck not run"
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
