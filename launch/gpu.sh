#!/usr/bin/env bash
# One machine with NVIDIA GPUs: environment, checks, training on all of them in one process.
#   bash launch/gpu.sh [--restart] --config=configs/edit.py:8b_256 --workdir=runs/edit ...
# --restart runs the same command again after a crash or a SIGTERM to the training; Ctrl-C ends both.
# CUDA_VISIBLE_DEVICES=0,1 takes those GPUs alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source launch/restart.sh

fail() {
  echo "error: $*" >&2
  exit 1
}

# jax[cuda13] brings CUDA with it, but not the driver.
check_driver() {
  local driver
  command -v nvidia-smi >/dev/null || fail "there is no nvidia-smi here: install NVIDIA's driver, 580 or newer;" \
    "without a GPU it is bash launch/local.sh"
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader) ||
    fail "nvidia-smi finds no GPU: $driver; restart the machine, or look at dmesg"
  driver=${driver%%$'\n'*}
  [ "${driver%%.*}" -ge 580 ] || fail "the NVIDIA driver is $driver, and CUDA 13 wants 580 or newer; update it"
}

check_jax() {
  local there seen
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then return; fi
  there=$(nvidia-smi -L | grep -c ^GPU)
  seen=$(.venv/bin/python -c 'import jax; print(sum(device.platform == "gpu" for device in jax.devices()))') || seen=0
  [ "$seen" -eq "$there" ] || fail "nvidia-smi lists $there GPUs and jax sees $seen; what jax says stands above, and" \
    "rm -rf .venv installs anew"
  nvidia-smi --query-gpu=name,memory.total,memory.used --format=csv,noheader
}

main() {
  local restart=''
  if [ "${1:-}" = --restart ]; then
    restart=again
    shift
  fi
  [ $# -gt 0 ] || fail "wanted are the arguments of the training, as bash launch/gpu.sh --config=configs/edit.py" \
    "--workdir=runs/edit"
  check_driver
  environment requirements.txt
  check_jax
  rm -f run.stop
  $restart .venv/bin/python -m unifusion_jax.main "$@"
}

main "$@"
