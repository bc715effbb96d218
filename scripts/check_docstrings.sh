#!/usr/bin/env bash
# Fails on docstring sections that contradict the signature, in the given folders.
#
# A docstring may leave Args or Returns out where the signature says it all, also when it has a
# Raises section. pydoclint cannot be told so, hence the filter; that an Args section lacks no
# argument is checked by ruff (D417).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

status=0
found=$(.venv/bin/pydoclint --quiet --style=google --exclude='shared/pb' \
  --arg-type-hints-in-docstring=False --check-return-types=False --check-yield-types=False \
  --check-class-attributes=False --skip-checking-raises=True \
  --show-filenames-in-every-violation-message=True "$@" 2>&1) || status=$?
if ((status)) && ! grep -q 'DOC[0-9]*:' <<<"$found"; then
  echo "$found" >&2
  exit "$status"
fi

renamed='DOC103:.*in the docstring but not in the function signature'
left_out='DOC(101|103|201|402):'
contradictions=$(grep 'DOC[0-9]*:' <<<"$found" |
  awk -v renamed="$renamed" -v left_out="$left_out" '$0 ~ renamed || $0 !~ left_out' || true)
if [[ -n $contradictions ]]; then
  echo "$contradictions" >&2
  exit 1
fi
