#!/usr/bin/env bash
# From nothing to an edited image on this machine: environment, an edit by the shipped model, then the main job on the
# embedded world (edits for five minutes or so) and a test of its result.
# Further arguments go to the job, e.g. bash launch/local.sh --config.train.steps=1000
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements.txt
run=(.venv/bin/python -m unifusion_jax.main --config=configs/edit.py)
echo "an edit by the shipped model (a new machine compiles for half a minute first) ..."
"${run[@]}" --mode=sample --workdir=runs/first --config.sample.references=docs/embedded/scene.png \
  --config.sample.prompt="make the circle blue"
echo "training it further; runs/local/samples/ shows what it makes of edits that it has not seen ..."
# Square canvases alone: two shapes to compile and not six
"${run[@]}" --mode=train --workdir=runs/local --config.data.aspects="('1:1',)" "$@"
