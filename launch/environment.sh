# Sourced by the other scripts: makes .venv in the repository's root and installs the named requirement files into it.
# Nothing is installed again while the files are unchanged.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Large pages for large arrays: without them a train step on the CPU spends a quarter of its time in page faults.
export GLIBC_TUNABLES="glibc.malloc.hugetlb=1${GLIBC_TUNABLES:+:$GLIBC_TUNABLES}"

python_for_us() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed; install it, or name it: PYTHON=/path/to/python3.12 bash launch/local.sh" >&2
  return 1
}

environment() {
  local python stamp
  if [ ! -x .venv/bin/python ]; then
    python=$(python_for_us)
    "$python" -m venv .venv
  fi
  stamp=".venv/installed-$(cat "$@" | sha256sum | cut -c1-16)"
  if [ ! -e "$stamp" ]; then
    echo "installing $* into .venv ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@")
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . 2>/dev/null \
      || .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    touch "$stamp"
  fi
}
