#!/usr/bin/env bash
# What tpu.sh runs on each host of a slice, in the copy of the repository there.
#   install                    an environment with Python 3.12 and jax for TPUs
#   start [--restart] ARGS     training with ARGS, detached; its output goes to run.log
#   status | logs              what became of it; its output until it ends
#   stop                       SIGTERM: saves and ends, and is not restarted
#   idle                       exit code 0 where no training runs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
UV_VERSION=${UV_VERSION:-0.13.9}

fail() {
  echo "error: $(hostname): $*" >&2
  exit 1
}

running() {
  [ -e run.pid ] && [ ! -e run.code ] && kill -0 "$(cat run.pid)" 2>/dev/null
}

idle() {
  ! running || fail "training runs here already (process $(cat run.pid)); end it first: bash launch/tpu.sh stop NAME"
}

# The images' own Python is 3.10, and their package manager is busy with updates after boot; uv needs neither.
python_312() {
  export PATH="$HOME/.local/bin:$PATH"
  if [ -x .venv/bin/python ]; then return; fi
  if ! command -v uv >/dev/null; then
    curl --retry 5 --retry-all-errors -LsSf "https://astral.sh/uv/$UV_VERSION/install.sh" | sh \
      || fail "uv cannot be fetched from astral.sh; a host without an external address needs Cloud NAT in its region"
  fi
  uv venv --quiet --seed --python 3.12 .venv || fail "uv cannot make an environment with Python 3.12; see above"
}

install() {
  # Large pages for the buffers that TPUs read from: without them a start says so and transfers are slower
  echo always 2>/dev/null | sudo -n tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null 2>&1 || true
  python_312
  export ACCELERATOR=tpu
  source launch/environment.sh
  environment requirements.txt
  echo "$(hostname): ready"
}

start() {
  idle
  rm -f run.stop run.code
  nohup setsid bash launch/host.sh keep "$@" >>run.log 2>&1 </dev/null &
  echo $! >run.pid
  echo "$(hostname): started"
}

# The detached part of start.
keep() {
  source launch/environment.sh
  source launch/restart.sh
  local code=0 restart='' command=(.venv/bin/python -m unifusion_jax.main)
  if [ "${1:-}" = --restart ]; then restart=again; shift; fi
  if [ -e run.env ]; then
    set -a
    # shellcheck source=/dev/null
    source ./run.env
    set +a
  fi
  echo "$(date -u +%FT%TZ) $(hostname): ${command[*]} $*"
  preemption $$ &
  $restart "${command[@]}" "$@" || code=$?
  pkill -P $! 2>/dev/null || true
  kill $! 2>/dev/null || true
  echo "$(date -u +%FT%TZ) $(hostname): ended with exit code $code"
  keep_log "$@"
  echo "$code" >run.code
}

# Waits for Google's notice that this machine is taken, and passes it to the training: SIGTERM to the children of process
# $1, which saves and is not restarted here. The notice comes 30 s before the end; elsewhere this returns at once.
preemption() {
  local answer curl=(curl -sf -H 'Metadata-Flavor: Google')
  local url=http://metadata.google.internal/computeMetadata/v1/instance/preempted
  answer=$("${curl[@]}" -m 5 "$url") || return 0
  until [ "$answer" = TRUE ]; do
    answer=$("${curl[@]}" "$url?wait_for_change=true") || sleep 5
  done
  echo "$(date -u +%FT%TZ) $(hostname): this machine is preempted"
  touch run.stop
  pkill -TERM -P "$1"
}

# A copy of the log beside the checkpoints: the machine may be gone in a moment.
keep_log() {
  local argument name
  name=$(hostname)-$(date -u +%FT%TZ).log
  for argument in "$@"; do
    if [[ $argument == --workdir=gs://* ]] && command -v gcloud >/dev/null; then
      timeout 20 gcloud storage cp --quiet run.log "${argument#--workdir=}/logs/$name" || true
    fi
  done
}

status() {
  if running; then echo "$(hostname): training runs; the last it said: $(tail -n 1 run.log)"
  elif [ -e run.code ]; then echo "$(hostname): training ended with exit code $(cat run.code)"
  elif [ -e run.pid ]; then echo "$(hostname): training was cut off with the machine"
  else echo "$(hostname): training was not started"; fi
}

logs() {
  [ -e run.log ] || fail "there is no run.log: training was not started"
  if running; then tail -n 200 --pid="$(cat run.pid)" -F run.log 2>/dev/null; else tail -n 200 run.log; fi
}

stop() {
  touch run.stop
  if running; then
    pkill -TERM -P "$(cat run.pid)" || true
    echo "$(hostname): SIGTERM sent; the step under way is finished and saved"
  else
    status
  fi
}

case ${1:-} in
  install | start | keep | status | logs | stop | idle) "$@" ;;
  *) fail "'${1:-}' is none of install, start, status, logs, stop, idle" ;;
esac
