#!/usr/bin/env bash
# Runs the numeric tests with the kernels that other processors get, two settings at a time.
# A setting that cannot change anything on this processor is named, not run.
set -uo pipefail
pytest=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

mkl=""
if ! grep -qw GenuineIntel /proc/cpuinfo; then
  cc -shared -fPIC -o "$scratch/mkl.so" "$(dirname "$0")/mkl_as_on_intel.c" || exit 1
  mkl="LD_PRELOAD=$scratch/mkl.so "
fi
settings=("${mkl}MKL_ENABLE_INSTRUCTIONS=SSE4_2" "${mkl}MKL_ENABLE_INSTRUCTIONS=AVX2"
  ATEN_CPU_CAPABILITY=default)
above=(MKL_ENABLE_INSTRUCTIONS=AVX512 ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx512
  ONEDNN_MAX_CPU_ISA=AVX2)
if grep -qw avx512f /proc/cpuinfo; then
  settings+=("${above[@]}")
else
  printf '== %s: as without it, this processor has nothing above\n' "${above[@]}"
fi

mapfile -t files < <(grep -rl "mark\.numeric" tests --include='test_*.py')
run() { # a setting of the environment
  local said rc=0
  # shellcheck disable=SC2086
  said=$(env $1 "$pytest" -q -m "numeric and not slow and not gpu" "${files[@]}" 2>&1) || rc=$?
  printf '== %s\n%s\n' "${1/$scratch\//}" "$said"
  return "$rc"
}

failed=0
for setting in "${settings[@]}"; do
  if (($(jobs -rp | wc -l) >= 2)); then wait -n || failed=1; fi
  run "$setting" &
done
while [ -n "$(jobs -p)" ]; do wait -n || failed=1; done
exit "$failed"
