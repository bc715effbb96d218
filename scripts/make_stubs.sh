#!/usr/bin/env bash
# Writes the Python stubs of proto/ under the given folder.
set -euo pipefail
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" # protoc looks for protoc-gen-mypy there

# `-Ishared/pb=proto` makes the stubs import one another as shared.pb.…
python -m grpc_tools.protoc -Ishared/pb=proto \
  --python_out="$out" --mypy_out=quiet:"$out" proto/trunkline/v1/*.proto
