#!/usr/bin/env bash
# Trains the embedded models within a wall-clock budget on one GPU: autoencoder, vision tower, VLM, text to image, edits.
#   bash launch/embedded.sh --minutes=9 [--folder=runs/embedded]
# Run again, it resumes; a stage with an export (FOLDER/STAGE/export) is done.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements.txt
.venv/bin/python -m unifusion_jax.scenes.retrain "$@"
echo "once --mode=eval finds them better, copy FOLDER/{vae,vlm,t2i,edit}/export to unifusion_jax/assets/tiny/ and let vlm and"
echo "vae in the copied unifusion.json be \"tiny\" (docs/training.md)"
