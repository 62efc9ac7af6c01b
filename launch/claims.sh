#!/usr/bin/env bash
# The paper's claims on scenes: trains, measures and writes docs/results and docs/paper.md.
#   bash launch/claims.sh --claims=a,b,c,d,e,f --seeds=3 --size=full                        # one GPU of 80 GB, hours
#   bash launch/claims.sh --claims=a,e,f --seeds=3 --size=short --jobs=6 --minutes=9        # the same, minutes
#   bash launch/claims.sh --claims=a,b,c,d,e,f --seeds=3 --size=reduced --jobs=2            # two CPU cores, overnight
#   bash launch/claims.sh --only=shipped_t2i,shipped_edit --size=reduced --jobs=2           # the same, what trains nothing
# Run again, it goes on, also from docs/results on another machine. Its flags are those of unifusion_jax/scenes/claims/run.py; --plan says what it would do.
# --replace, of report.py, writes over results in docs/results that the run has not.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment requirements.txt
if ! .venv/bin/python -c 'import matplotlib' 2>/dev/null; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check 'matplotlib>=3.10'
fi
if nvidia-smi -L >/dev/null 2>&1; then
  export XLA_FLAGS="--xla_gpu_enable_triton_gemm=false ${XLA_FLAGS:-}"  # fewer kernels to try, as in embedded.sh
fi
run=() report=()  # flags of each
while [ $# -gt 0 ]; do
  case "$1" in
    --folder | --docs)
      run+=("${@:1:2}") report+=("${@:1:2}")
      shift "$(($# > 1))"
      ;;
    --folder=* | --docs=*) run+=("$1") report+=("$1") ;;
    --replace) report+=("$1") ;;
    *) run+=("$1") ;;
  esac
  shift
done
for flag in "${run[@]}"; do
  if [ "$flag" = --plan ]; then exec .venv/bin/python -m unifusion_jax.scenes.claims.run "${run[@]}"; fi
done
failed=0
.venv/bin/python -m unifusion_jax.scenes.claims.run "${run[@]}" || failed=$?
.venv/bin/python -m unifusion_jax.scenes.claims.report "${report[@]}"
exit "$failed"
