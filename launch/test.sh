#!/usr/bin/env bash
# Environment, test requirements, a browser, the linter and the tests, in a process a core (four at most: each takes up to 4 GiB).
# Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements.txt requirements-test.txt
browser
.venv/bin/ruff check
cores=$(nproc)
.venv/bin/python -m pytest -q -n "$((cores < 4 ? cores : 4))" --dist loadfile "$@"
