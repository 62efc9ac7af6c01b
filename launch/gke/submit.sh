#!/usr/bin/env bash
# Trains on a GKE cluster that has the JobSet controller and a node pool of the slice or the GPUs.
#
#   bash launch/gke/submit.sh NAME --topology=v6e:4x4 --image=IMAGE --workdir=gs://BUCKET/RUN --config=...
#   bash launch/gke/submit.sh NAME --gpus=nvidia-h100-80gb:8 --nodes=2 ... the same ...
#
# --image=IMAGE            of launch/Dockerfile, in a registry that the cluster reads
# --restarts=20            starts after a crash; those after a preemption or a save (exit code 143) do not count
# --spot                   nodes of spot capacity alone
# --service-account=NAME   the Kubernetes account that may use the bucket (Workload Identity). Without it TPUs take the
#                          namespace's default, and GPUs one of the run's name, which the manifest makes
# --env=NAME=VALUE         a variable for the training
# --dry-run                prints the manifest and applies nothing
# --yes                    does not ask
# All other arguments are those of unifusion_jax.main. Then: kubectl get jobset NAME, kubectl logs -f -l
# jobset.sigs.k8s.io/jobset-name=NAME, kubectl delete jobset NAME.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/topologies.sh
source "$here/../topologies.sh"

# A text in double quotes, as JSON and YAML have it. Kubernetes would take $(NAME) in it for a variable.
text() {
  local escaped=${1//\\/\\\\}
  escaped=${escaped//\"/\\\"}
  escaped=${escaped//\$\(/\$\$(}
  [[ $escaped != *[[:cntrl:]]* ]] || fail "an argument has a control character: ${1@Q}"
  printf '"%s"' "$escaped"
}

texts() {
  local each separator=''
  printf '['
  for each in "$@"; do
    printf '%s' "$separator"
    text "$each"
    separator=', '
  done
  printf ']'
}

variables() {
  local each separator=''
  printf '['
  for each in "$@"; do
    [[ $each =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env=$each: wanted is NAME=VALUE"
    printf '%s{name: %s, value: %s}' "$separator" "${each%%=*}" "$(text "${each#*=}")"
    separator=', '
  done
  printf ']'
}

# The manifest of a file, each ${NAME} in it replaced by what fields has for it.
declare -A fields
fill() {
  local manifest='' rest
  rest=$(<"$1")
  while [[ $rest =~ \$\{([A-Z_]+)\} ]]; do
    manifest+=${rest%%"${BASH_REMATCH[0]}"*}${fields[${BASH_REMATCH[1]}]}
    rest=${rest#*"${BASH_REMATCH[0]}"}
  done
  printf '%s\n' "$manifest$rest"
}

main() {
  local topology='' gpus='' nodes=1 image='' workdir='' restarts=20 spot='' account='' exports=() dry_run='' yes=''
  local name=${1:-} arguments=() word value manifest
  case $name in
    '' | -*)
      sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
      exit 2 ;;
  esac
  shift
  while [ $# -gt 0 ]; do
    word=$1 value=${1#*=}
    shift
    case $word in
      --topology=*) topology=$value ;;
      --gpus=*) gpus=$value ;;
      --nodes=*) nodes=$value ;;
      --image=*) image=$value ;;
      --workdir=*) workdir=$value ;;
      --restarts=*) restarts=$value ;;
      --spot) spot=1 ;;
      --service-account=*) account=$value ;;
      --env=*) exports+=("$value") ;;
      --dry-run) dry_run=1 ;;
      --yes) yes=1 ;;
      *) arguments+=("$word") ;;
    esac
  done
  # JobSet makes names of pods of it, which have 63 characters at most
  [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "'$name': wanted is a name of up to 40 small letters," \
    "digits and dashes"
  [ -n "$image" ] || fail "--image=REGISTRY/unifusion_jax:TAG is wanted; launch/Dockerfile makes it"
  [[ $workdir == gs://?*/?* ]] || fail "--workdir=$workdir: wanted is a folder in a bucket, gs://BUCKET/RUN"
  [[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts=$restarts: wanted is a whole number"
  [[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes=$nodes: wanted is a whole number from 1"
  if [ -n "$topology" ] && [ -z "$gpus" ]; then
    slice "$topology"
    manifest=$here/tpu.yaml
    fields=([HOSTS]=$hosts [CHIPS]=$host_chips [ACCELERATOR]=$gke [TOPOLOGY]=$shape
            [SERVICE_ACCOUNT]=${account:-default})
  elif [[ $gpus =~ ^[a-z0-9-]+:[1-9][0-9]*$ ]] && [ -z "$topology" ]; then
    manifest=$here/gpu.yaml
    fields=([HOSTS]=$nodes [CHIPS]=${gpus#*:} [ACCELERATOR]=${gpus%:*} [SERVICE_ACCOUNT]=${account:-$name})
  else
    fail "wanted is either --topology=v6e:4x4 or --gpus=nvidia-h100-80gb:8 (those of one node) with --nodes=N"
  fi
  if [ "${fields[HOSTS]}" -gt 1 ]; then arguments=(--distributed "${arguments[@]}"); fi
  fields+=([NAME]=$name [RESTARTS]=$restarts [IMAGE]=$(text "$image") [ENV]=$(variables "${exports[@]}")
           [ARGS]=$(texts "--workdir=$workdir" "${arguments[@]}")
           [SPOT_SELECTOR]=${spot:+'cloud.google.com/gke-spot: "true"'})
  manifest=$(fill "$manifest")
  printf '%s\n' "$manifest"
  if [ -n "$dry_run" ]; then return; fi
  if [ -z "$yes" ]; then
    agree "This takes ${fields[HOSTS]} x ${fields[CHIPS]} chips of ${fields[ACCELERATOR]} in the cluster $(
      kubectl config current-context)."
  fi
  kubectl apply -f - <<<"$manifest"
}

main "$@"
