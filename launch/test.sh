#!/usr/bin/env bash
# Runs linter and tests in .venv with the test requirements. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements.txt requirements-test.txt
.venv/bin/ruff check
.venv/bin/python -m pytest -q "$@"
