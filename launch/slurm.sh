#!/usr/bin/env bash
#SBATCH --job-name=unifusion
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:TERM@120
# Training on GPU nodes of Slurm, one process a GPU, as jax finds them there. From the repository, on a file system that
# all nodes see; options on the command line go before those above:
#   sbatch [--nodes=2] [--partition=P] launch/slurm.sh --config=configs/edit.py:8b --workdir=/shared/runs/edit ...
# Where the nodes have no internet, make the environment on a login node that has:
#   ACCELERATOR=cuda13 bash -c 'source launch/environment.sh && environment requirements.txt'
# 120 s before its time is over this script gets SIGTERM, and when the job is preempted too where the cluster says
# PreemptParameters=send_user_signal: the training saves, and the job goes back into the queue, until it ends by itself.
# scancel ends it for good.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

# Slurm runs a copy of this script from its own folder.
cd "${SLURM_SUBMIT_DIR:-.}"
[ -n "${SLURM_JOB_ID:-}" ] || fail "this runs in a Slurm job: sbatch launch/slurm.sh --config=... --workdir=..."
[ -e launch/environment.sh ] || fail "$PWD is not the repository; run sbatch launch/slurm.sh there"
[ $# -gt 0 ] || fail "wanted are the arguments of the training, as sbatch launch/slurm.sh --config=configs/edit.py" \
  "--workdir=/shared/runs/edit"

per_node=${SLURM_NTASKS_PER_NODE:-1} gpus=${SLURM_GPUS_ON_NODE:-$per_node}
[ "$per_node" -eq "$gpus" ] || fail "$per_node processes and $gpus GPUs a node: each process takes one GPU, so" \
  "--ntasks-per-node=$gpus --gpus-per-node=$gpus"

# shellcheck source=launch/environment.sh
source launch/environment.sh
environment requirements.txt

saved='' code=0
# A process that has saved ends with 143 while others may still write: srun must not end them for it. Where one is lost
# the others end by themselves.
srun --kill-on-bad-exit=0 .venv/bin/python -m unifusion_jax.main --distributed "$@" &
step=$!
# srun passes the signal on to all processes, once
trap 'saved=1; kill -TERM "$step"' TERM
wait "$step" || code=$?
# A wait that a signal ended says so with a code over 128, and the step still runs
while kill -0 "$step" 2>/dev/null; do
  code=0
  wait "$step" || code=$?
done
echo "$(date -u +%FT%TZ) job $SLURM_JOB_ID ended with exit code $code"
if [ -n "$saved" ] && [ "$code" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
