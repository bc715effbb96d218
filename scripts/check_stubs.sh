#!/usr/bin/env bash
# Fails if the stubs in shared/pb differ from what proto/ gives.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
scripts/make_stubs.sh "$fresh"
if ! diff -r --unified --exclude=__init__.py --exclude=__pycache__ shared/pb "$fresh/shared/pb"; then
  echo "shared/pb is stale: run 'make proto'" >&2
  exit 1
fi
