# shellcheck shell=bash disable=SC2164  # who sources it has set -e
# Sourced by the other scripts: creates .venv in the repository's root and installs the given requirement files.
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

# Prints the pip requirement of jax for this machine's accelerator, or nothing. ACCELERATOR=tpu or cuda13 says which.
accelerator() {
  if [ -n "${ACCELERATOR:-}" ]; then
    echo "jax[$ACCELERATOR]"
  elif nvidia-smi -L >/dev/null 2>&1; then
    echo 'jax[cuda13]'
  elif compgen -G '/dev/accel*' >/dev/null || { [ -d /dev/vfio ] && [ -n "${TPU_NAME:-}${TPU_ACCELERATOR_TYPE:-}" ]; }; then
    echo 'jax[tpu]'
  fi
}

environment() {
  local python stamp device=()
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(python_for_us)
    if ! "$python" -m venv --clear .venv; then
      echo "error: $python cannot create an environment; on Debian and Ubuntu install its venv package: apt-get install python3-venv" >&2
      return 1
    fi
  fi
  read -ra device <<<"$(accelerator)"
  if [ "${device[0]:-}" = 'jax[tpu]' ]; then device+=(gcsfs); fi  # TPUs are beside buckets: gs:// addresses
  stamp=".venv/installed-$( (cat "$@"; echo "${device[*]}") | sha256sum | cut -c1-16)"
  if [ ! -e "$stamp" ]; then
    echo "installing $*${device[0]:+ and ${device[*]}} into .venv ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${@/#/--requirement=}" "${device[@]}"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . 2>/dev/null \
      || .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    touch "$stamp"
  fi
}

# A browser for the tests of the page: what is installed, Debian's Chromium, or Playwright's own download.
browser() {
  if command -v chromium chromium-browser google-chrome >/dev/null; then return; fi
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    echo 'installing chromium for the tests ...'
    if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } \
      >.venv/chromium.log 2>&1; then return; fi
  fi
  .venv/bin/python -m playwright install chromium-headless-shell
}
