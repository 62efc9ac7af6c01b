#!/usr/bin/env bash
# Trains the embedded models within a wall-clock budget on one GPU: autoencoder, vision tower, VLM, text to image, edits.
#   bash launch/embedded.sh --minutes=9 [--from_shipped=vlm,t2i,edit] [--folder=runs/embedded]
# Run again, it resumes; a stage with an export (FOLDER/STAGE/export) is done.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements.txt
if nvidia-smi -L >/dev/null 2>&1; then
  # The processes that compile try kernels on the same GPU: the training, which takes 29 GiB, leaves them half of 80.
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.5}"
  # Products by cuBLAS alone: fewer kernels to try, and so less to compile. The default was not compared.
  export XLA_FLAGS="--xla_gpu_enable_triton_gemm=false ${XLA_FLAGS:-}"
fi
.venv/bin/python -m unifusion_jax.scenes.retrain "$@"
echo "once --mode=eval finds them better, copy FOLDER/{vae,vlm,t2i,edit}/export to unifusion_jax/assets/tiny/ and let vlm and"
echo "vae in the copied unifusion.json be \"tiny\" (docs/training.md)"
