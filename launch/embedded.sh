#!/usr/bin/env bash
# The embedded models anew, one after another, from the shipped autoencoder on: the VLM's eye, the VLM, text to image, edits.
#   bash launch/embedded.sh [FOLDER] [settings for every stage, e.g. --config.train.steps=100]
# Run again, it goes on where it stood; a stage that wrote its weights (FOLDER/STAGE/export) is done.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements.txt
folder=${1:-runs/embedded}
settings=("${@:2}")

# A GPU takes large batches of scanned layers in bfloat16, and as many processes to draw scenes as there are cores.
large=() dit=()
if nvidia-smi -L >/dev/null 2>&1; then
  large=(--config.data.batch_size=256 --config.data.workers="$(nproc)")
  dit=(--config.model.dtype=bfloat16 --config.optim.learning_rate=4e-3)
fi

stage() {  # name, recipe, its settings
  local name=$1 recipe=$2
  [ -d "$folder/$name/export" ] && return
  for mode in train export; do
    .venv/bin/python -m unifusion_jax.main --config="$recipe" --workdir="$folder/$name" --mode="$mode" \
      "${@:3}" "${large[@]}" "${settings[@]}"
  done
}

stage eye configs/vlm.py:eye
stage vlm configs/vlm.py --config.init="$folder/eye/export"
stage t2i configs/t2i.py --config.vlm="$folder/vlm/export" "${dit[@]}"
stage edit configs/edit.py --config.vlm="$folder/vlm/export" --config.init="$folder/t2i/export" --config.train.steps=5000 "${dit[@]}"
echo "done: copy $folder/{vlm,t2i,edit}/export to unifusion_jax/assets/tiny/ and measure them with --mode=eval (docs/embedded.md)"
