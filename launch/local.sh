#!/usr/bin/env bash
# From nothing to an edited image on this machine: environment, an edit by the shipped model, then the main job on the
# embedded world for three minutes, with a grid of what it makes of edits that it has not seen.
# Further arguments go to the job, e.g. bash launch/local.sh --config.train.minutes=30
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements.txt
run=(.venv/bin/python -m unifusion_jax.main --config=configs/edit.py)
echo "editing an image with the shipped model (half a minute of compilation on a new machine) ..."
"${run[@]}" --mode=sample --workdir=runs/first --config.sample.references=docs/embedded/scene.png \
  --config.sample.prompt="make the circle blue"
echo "training edits for three minutes; runs/local/samples/ then shows its images of unseen edits ..."
# Square canvases alone: two shapes of batch to compile and not six
"${run[@]}" --mode=train --workdir=runs/local --config.data.aspects="('1:1',)" --config.train.minutes=3 \
  --config.train.preview_every=100000 --config.train.save_every=50 "$@"
