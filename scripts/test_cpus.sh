#!/usr/bin/env bash
# Runs the numeric tests with the kernels that other processors get, one setting after the other.
# A setting that cannot change anything on this processor is named, not run.
set -uo pipefail
pytest=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

has() { grep -qw "$1" /proc/cpuinfo; }

mkl=()
if ! grep -qw GenuineIntel /proc/cpuinfo; then
  cc -shared -fPIC -o "$scratch/mkl.so" "$(dirname "$0")/mkl_as_on_intel.c" || exit 1
  mkl=("LD_PRELOAD=$scratch/mkl.so")
fi

failed=0
run() { # settings of the environment
  echo "== ${*/$scratch\//}"
  env "$@" "$pytest" -q -m "numeric and not slow and not gpu" || failed=1
}
same() { echo "== $1: as without it, this processor has nothing above"; }

run "${mkl[@]}" MKL_ENABLE_INSTRUCTIONS=SSE4_2
run "${mkl[@]}" MKL_ENABLE_INSTRUCTIONS=AVX2
run ATEN_CPU_CAPABILITY=default
if has avx512f; then
  run MKL_ENABLE_INSTRUCTIONS=AVX512
  run ATEN_CPU_CAPABILITY=avx2
  run ATEN_CPU_CAPABILITY=avx512
  run ONEDNN_MAX_CPU_ISA=AVX2
else
  same MKL_ENABLE_INSTRUCTIONS=AVX512
  same ATEN_CPU_CAPABILITY=avx2
  same ATEN_CPU_CAPABILITY=avx512
  same ONEDNN_MAX_CPU_ISA=AVX2
fi
exit "$failed"
