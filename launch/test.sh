#!/usr/bin/env bash
# Environment, test requirements, a browser, linter, types and the tests, in a process a core (four at most: each takes up
# to 4 GiB). Arguments go to pytest; --slow runs the tests that are marked slow, too.
# LOWEST=1: with the lower bounds of all requirements, in a fresh clone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
requirements=(requirements.txt requirements-test.txt)
if [ "${LOWEST:-}" = 1 ]; then
  mkdir -p build
  for file in "${requirements[@]}"; do sed 's/>=/==/' "$file" >"build/lowest-$file"; done
  requirements=("${requirements[@]/#/build/lowest-}")
fi
environment "${requirements[@]}"
browser
.venv/bin/ruff check
.venv/bin/pyrefly check --summary=none
cores=$(nproc)
.venv/bin/python -m pytest -q -n "$((cores < 4 ? cores : 4))" --dist loadfile --no-loadscope-reorder "$@"
