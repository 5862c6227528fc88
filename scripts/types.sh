#!/usr/bin/env bash
# Check the types: the flat folders are linked under the names that they are installed by, and mypy looks at those.
set -euo pipefail
cd "$(dirname "$0")/.."

tree=build/types/harmony_fast
mkdir -p "$tree"
for entry in harmony_fast/__init__.py kernels harmony engine bench configs; do
    ln -sfn "$PWD/$entry" "$tree/$(basename "$entry")"
done
exec .venv/bin/mypy "$@"
