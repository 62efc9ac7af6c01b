# shellcheck shell=bash disable=SC2034  # variables for who sources it
# Sourced by tpu.sh and gke/submit.sh: generations of TPUs and the slices that exist of each. The one table of both.
# Sources, read 2026-11-27: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x,tpus-and-migs,runtimes}, and for the image
# families `gcloud compute images list --project=ubuntu-os-accelerator-images --no-standard-images`.

# API: "compute" is Compute Engine, "queued" the queued resources of the Cloud TPU API, which alone has v5e machines.
# Machines: the type's name without its last part, -1t for one chip; the numbers of chips that one machine may have.
GENERATIONS='
# name   API      machines        of chips  most  shapes  image family or runtime version          in GKE
  v5e    queued   ct5lp-hightpu   1,4,8     256   flat    v2-alpha-tpuv5-lite                      tpu-v5-lite-podslice
  v6e    compute  ct6e-standard   1,4,8     256   flat    ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e  tpu-v6e-slice
  v5p    compute  ct5p-hightpu    4         6144  cubes   ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e  tpu-v5p-slice
  tpu7x  compute  tpu7x-standard  4         9216  cubes   ubuntu-accel-2404-amd64-tpu-tpu7x        tpu7x
'
FLAT='1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16'
CUBES='2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16'  # and others of multiples of 4 that rise

fail() {
  echo "error: $*" >&2
  exit 1
}

# Asks before what costs money or deletes, and ends where the answer is not yes.
agree() {
  local answer=
  printf '%s Go on? [y/N] ' "$1" >&2
  if ! read -r answer; then
    echo >&2
    fail "nobody answers whether to go on; --yes goes on without asking"
  fi
  [[ $answer == [yY]* ]] || fail "nothing was done"
}

# The words of a command as a shell reads them again.
quoted() {
  local word line=
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s\n' "${line# }"
}

product() {
  echo $((${1//x/*}))
}

# Whether 4x4x12 and the like: multiples of 4 that rise.
large_cube() {
  local before=4 side
  [[ $1 =~ ^[0-9]+x[0-9]+x[0-9]+$ ]] || return
  for side in ${1//x/ }; do
    [ $((10#$side % 4)) -eq 0 ] && [ $((10#$side)) -ge "$before" ] || return
    before=$((10#$side))
  done
}

# slice v6e:4x4 [MACHINE]: sets generation, api, machine, software, gke, shape, chips, host_chips and hosts.
# A number of chips (v6e:16) stands for its usual shape; MACHINE (ct6e-standard-4t) is another than the usual one.
slice() {
  local asked=$1 given=${2:-} row family sizes most shapes known others='' each
  generation=${asked%%:*} shape=${asked#*:} chips=
  row=$(awk -v generation="$generation" '$1 == generation' <<<"$GENERATIONS")
  if [ -z "$row" ] || [[ $asked != *:* ]]; then
    fail "--topology=$asked: wanted is v5e, v6e, v5p or tpu7x with a shape or a number of chips, as v6e:4x4 or v6e:16"
  fi
  read -r _ api family sizes most shapes software gke <<<"$row"
  known=$FLAT
  if [ "$shapes" = cubes ]; then known=$CUBES others=', and others of multiples of 4 that rise'; fi
  for each in $known; do
    if [ "$shape" = "$each" ] || [ "$shape" = "$(product "$each")" ]; then shape=$each chips=$(product "$each"); fi
  done
  if [ -n "$others" ] && large_cube "$shape"; then chips=$(product "$shape"); fi
  if [ -z "$chips" ] || [ "$chips" -gt "$most" ]; then
    fail "--topology=$asked: there is no such slice; of $generation there are ${known// /, }$others, up to $most chips"
  fi
  if [[ ,$sizes, == *,$chips,* ]]; then host_chips=$chips; else host_chips=4; fi
  machine=${given:-$family-${host_chips}t}
  host_chips=${machine#"$family"-} host_chips=${host_chips%t}
  if [[ ,$sizes, != *,$host_chips,* ]] || [ $((chips % host_chips)) -ne 0 ] ||
     { [ "$chips" -gt "$host_chips" ] && [ "$host_chips" -ne 4 ]; }; then
    fail "--machine=$machine: a machine of $generation is $family-Nt, with N of $sizes; several make a slice with N = 4"
  fi
  hosts=$((chips / host_chips))
}
