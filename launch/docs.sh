#!/usr/bin/env bash
# The documentation as a site in build/site, with the reference from the code's docstrings; a dead link, or a page that
# the navigation does not have, ends it. Arguments go to MkDocs: bash launch/docs.sh --site-dir=DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements-docs.txt
# FILES: the address before the path of a file of the repository; from a clone of GitHub it is known
github=$(git remote get-url origin 2>/dev/null | sed -nE 's#\.git$##; s#^(https://|ssh://git@|git@)github\.com[:/]#https://github.com/#p' || true)
export FILES="${FILES-${github:+$github/blob/HEAD/}}"
.venv/bin/python -m mkdocs build --strict "$@"
