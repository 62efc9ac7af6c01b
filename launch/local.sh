#!/usr/bin/env bash
# From nothing to an edited picture on this machine: environment, the main job on the embedded world, a test of its result.
# Further arguments go to the job, e.g. bash launch/local.sh --config.train.steps=1000
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements.txt
.venv/bin/python -m unifusion_jax.main --config=configs/edit.py --mode=train --workdir=runs/edit "$@"
