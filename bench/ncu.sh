#!/usr/bin/env bash
# What the hardware counts during one call at each of a few sizes, by Nsight Compute, into
# $1/ncu_<op>_<shape>_<rows>.txt: bytes from memory, wavefronts and bank conflicts of shared memory, how busy the
# tensor cores, the issue slots and the warps were. Clocks are left alone. A size that cannot be profiled (no
# permission, no such counter) is named.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?expected a folder for the results}
python=${PYTHON:-python3}
mkdir -p "$out"

counters=dram__bytes_read.sum,dram__bytes_write.sum
counters+=,l1tex__data_pipe_lsu_wavefronts_mem_shared.sum,l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum
counters+=,sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active
counters+=,sm__inst_issued.avg.pct_of_peak_sustained_active,sm__warps_active.avg.pct_of_peak_sustained_active
sections=()
for section in SpeedOfLight MemoryWorkloadAnalysis MemoryWorkloadAnalysis_Tables ComputeWorkloadAnalysis \
  SchedulerStats WarpStateStats Occupancy LaunchStats; do
  sections+=(--section "$section")
done

profile() {
  timeout 90 ncu --clock-control none --profile-from-start off --print-details all "${sections[@]}" "$@"
}

while read -r op shape rows; do
  file=$out/ncu_${op}_${shape}_$rows.txt
  call=("$python" bench/one_call.py "$op" "$shape" "$rows")
  # Counters have other names on other chips; the sections know them.
  profile --metrics "$counters" "${call[@]}" >"$file" 2>&1 </dev/null ||
    profile "${call[@]}" >>"$file" 2>&1 </dev/null ||
    echo "not profiled, $op $shape $rows: $(grep -E 'ERROR|Error' "$file" | tail -n 1)"
done <<'SIZES'
forward 14336x4096 1
forward 4096x4096 16
forward 14336x4096 128
forward 4096x4096 1024
dx 14336x4096 128
SIZES
