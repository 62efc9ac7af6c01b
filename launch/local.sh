#!/usr/bin/env bash
# From a fresh clone to an edited image: environment, an edit by the shipped model, then minutes of training edits.
# Further arguments go to the training, e.g. bash launch/local.sh --config.train.steps=1000
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements.txt
run=(.venv/bin/python -m unifusion_jax.main --config=configs/edit.py)
echo "editing an image with the shipped model (half a minute of compilation on a new machine) ..."
"${run[@]}" --mode=sample --workdir=runs/first --config.sample.references=docs/embedded/scene.png \
  --config.sample.prompt="make the circle blue"
echo "training edits; runs/local/samples/ shows its images of unseen edits ..."
# Square canvases alone: two shapes to compile and not six
"${run[@]}" --mode=train --workdir=runs/local --config.data.aspects="('1:1',)" "$@"
