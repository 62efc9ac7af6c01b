#!/usr/bin/env bash
# TPUs of Google Cloud: gets a slice, trains on it, brings it back after a preemption, gives it back.
#
#   bash launch/tpu.sh create NAME --topology=v6e:4x4 --zone=us-east5-a [--pay=on-demand|spot|flex-start|reserved]
#   bash launch/tpu.sh run    NAME --workdir=gs://BUCKET/RUN [--restart] --config=configs/edit.py:8b ...
#   bash launch/tpu.sh status|logs|ssh|stop|resume|delete NAME
#
# --dry-run prints each command and runs none; --yes answers what is asked before anything that costs money or deletes.
# create   --reservation=R         the reservation that --pay=reserved takes
#          --max-run=24h           deleted after that time; flex-start always is, after at most 7d
#          --wait=2h               how long to wait for a slice before the request is withdrawn
#          --machine=TYPE --image=FAMILY --disk=200GB --project=P   others than the usual ones
#          --create-flags="--subnet=S --no-address" --ssh-flags=--tunnel-through-iap   more flags for the gcloud
#                                  commands that create and connect; queued resources (v5e) have names of their own
#                                  for them: --network, --subnetwork, --internal-ips
# run      --restart               on the hosts, again after a preemption that was saved and after a crash
#          --ref=COMMIT            that commit and not the files as they are
#          --env=NAME=VALUE|NAME   variables for the training; NAME alone takes its value from here (HF_TOKEN)
#          all other arguments are those of unifusion_jax.main
# resume   --watch                 stays, and brings the slice back as often as it is taken, until training has ended
# logs, ssh --host=0               one host; ssh NAME -- COMMAND runs a command
#
# What create and run were told is kept in .cache/launch/NAME, for the other verbs.
# shellcheck disable=SC2329  # verbs and backends are called by their names
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ "${BASH_VERSINFO[0]}" -lt 5 ]; then
  echo "error: this is bash $BASH_VERSION, wanted is 5 or newer; on macOS: brew install bash" >&2
  exit 1
fi
# shellcheck source=launch/topologies.sh
source "$root/launch/topologies.sh"
# shellcheck source=launch/backends.sh
source "$root/launch/backends.sh"
POLL_SECONDS=${POLL_SECONDS:-15}
export CLOUDSDK_CORE_DISABLE_PROMPTS=1  # gcloud's own questions would not be seen
HOSTS_AT_ONCE=16

# --------------------------------------------------------------------------------------------- slices, whichever
# Sets state: waiting, ready, preempted, failed or absent. A slice that was there once and is no more was preempted.
judge() {
  detail=
  "${backend}_state"
  case $mode:$state in
    print:*) state=ready ;;
    run:waiting | run:absent) if [ -e "$record/ready" ]; then state=preempted; fi ;;
  esac
}

await() {
  local deadline=$((SECONDS + $(seconds "$wait_for"))) before=-
  while judge && [ "$mode" = run ]; do
    if [ "$detail" != "$before" ]; then
      echo "$name: $state${detail:+ ($detail)}"
      before=$detail
    fi
    case $state in
      ready) break ;;
      preempted | absent) give_up "$name was taken back while it started; the same command tries again" ;;
      failed) give_up "$name was refused" ;;
    esac
    if [ "$SECONDS" -ge "$deadline" ]; then
      give_up "$name was not there within $wait_for; a longer --wait waits longer"
    fi
    sleep "$POLL_SECONDS"
  done
  trap - INT
  if [ "$mode" = run ]; then touch "$record/ready"; fi
  made=()
}

still_asked() {
  echo "error: no longer waiting, but $name is still asked for and costs money once it is there; bash launch/tpu.sh" \
    "delete $name takes the request back" >&2
  exit 130
}

create_and_wait() {
  if [ "$mode" = run ]; then trap still_asked INT; fi
  "${backend}_create"
  await
}

# on HOST COMMAND, its lines marked with the host where there are several.
on() {
  if [ "$mode" = print ]; then printed_remote "$1" "$2"
  elif [ "$hosts" -eq 1 ]; then "${backend}_remote" "$1" "$2"
  else "${backend}_remote" "$1" "$2" 2>&1 | sed -u "s/^/[${1##*-}] /"; fi
}

# A remote command, or a copy, as it would be run: the functions above with gcloud as an echo.
printed_remote() { (gcloud() { echo "  $(quoted gcloud "$@")"; }; "${backend}_remote" "$1" "$2"); }
printed_copy() { (gcloud() { echo "  $(quoted gcloud "$@")"; }; "${backend}_copy" "$1" "$2" "$3"); }

put() {
  local send=${backend}_copy
  if [ "$mode" = print ]; then send=printed_copy; fi
  "$send" "$1" "$bundle" unifusion_jax.tar.gz
}

# everywhere FUNCTION [COMMAND]: FUNCTION HOST COMMAND on all hosts, HOSTS_AT_ONCE at a time; fails if one does.
everywhere() {
  local function=$1 command=${2:-} host bad='' jobs=() i
  for ((i = 0; i < ${#names[@]}; i++)); do
    host=${names[i]}
    if [ "$mode" = print ]; then "$function" "$host" "$command"; continue; fi
    "$function" "$host" "$command" &
    jobs+=("$!:$host")
    if [ $(((i + 1) % HOSTS_AT_ONCE)) -eq 0 ] || [ $((i + 1)) -eq ${#names[@]} ]; then
      for each in "${jobs[@]}"; do wait "${each%%:*}" || bad+=" ${each#*:}"; done
      jobs=()
    fi
  done
  [ -z "$bad" ] || fail "host$bad of $name failed; what they said stands above"
}

# Sets names, the hosts to talk to: all, or the one of --host.
find_hosts() {
  said=
  "${backend}_hosts"
  if [ "$mode" = print ] && [ -z "$said" ]; then said=HOST; echo "  # and for each HOST of the $hosts:"; fi
  mapfile -t names <<<"$said"
  [ -n "${names[0]}" ] || fail "$name has no hosts; bash launch/tpu.sh status $name"
  if [ -n "$host" ] && [ "$mode" = run ]; then
    if ! [[ $host =~ ^[0-9]+$ ]] || [ "$host" -ge "${#names[@]}" ]; then
      fail "--host=$host: $name has the hosts 0 to $((${#names[@]} - 1))"
    fi
    names=("${names[$host]}")
  fi
}

# Waits for the first host to answer: its daemon starts later than it runs, and the first connection makes a key.
reach() {
  local tries
  if [ "$mode" = print ]; then return; fi
  for ((tries = 1; tries <= 20; tries++)); do
    if said=$("${backend}_remote" "${names[0]}" true 2>&1); then return; fi
    sleep "$POLL_SECONDS"
  done
  fail "${names[0]} does not answer to ssh: $(tail -n 3 <<<"$said"); without an external address" \
    "it wants --ssh-flags=--tunnel-through-iap"
}

# ------------------------------------------------------------------------------------------------------- a run
# The repository as a tar file: what git knows and would add, or one commit; and the variables of --env in run.env.
pack() {
  local folder=$1 file
  cd "$root"
  if [ -n "$ref" ]; then
    git archive --format=tar -o "$folder/bundle.tar" "$ref" || fail "--ref=$ref is no commit of $root"
  elif git rev-parse --git-dir >/dev/null 2>&1; then
    git ls-files -co --exclude-standard --deduplicate -z | while IFS= read -r -d '' file; do
      if [ -e "$file" ]; then printf '%s\0' "$file"; fi
    done | tar -cf "$folder/bundle.tar" --null -T -
  else
    tar -cf "$folder/bundle.tar" --exclude=./.venv --exclude=./.cache --exclude=./runs --exclude=./out .
  fi
  (umask 077; variables >"$folder/run.env")
  tar -rf "$folder/bundle.tar" -C "$folder" run.env
  gzip -1 "$folder/bundle.tar"
}

variables() {
  local each value
  for each in "${exports[@]}"; do
    if [[ $each == *=* ]]; then value=${each#*=}; else value=${!each-}; fi
    [ -n "$value" ] || fail "--env=$each: there is no $each here; --env=$each=VALUE, or export it"
    printf '%s=%q\n' "${each%%=*}" "$value"
  done
}

# On a host: nothing may run; all of the copy before goes but its environment, its compiled programs and its log.
UNPACK='mkdir -p unifusion_jax && cd unifusion_jax && if [ -e launch/host.sh ]; then bash launch/host.sh idle; fi'
UNPACK+=' && find . -mindepth 1 -maxdepth 1 ! -name .venv ! -name .cache ! -name "run.*" -exec rm -rf {} +'
UNPACK+=' && tar -xzf ../unifusion_jax.tar.gz && bash launch/host.sh install'

start_run() {
  local command=()
  find_hosts
  reach
  if [ "$mode" = run ]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    pack "$scratch"
    bundle=$scratch/bundle.tar.gz
    echo "copying $(du -h "$bundle" | cut -f1) to $name ($hosts x $machine), and installing ..."
  fi
  everywhere put
  everywhere on "$UNPACK"
  command=(bash launch/host.sh start ${restart:+--restart})
  if [ "$hosts" -gt 1 ]; then command+=(--distributed); fi  # one host alone has nothing that tells jax of others
  command+=("--workdir=$workdir" "${arguments[@]}")
  everywhere on "cd unifusion_jax && $(quoted "${command[@]}")"
  if [ "$mode" = run ]; then echo "its output: bash launch/tpu.sh logs $name"; fi
}

check_run() {
  case $workdir in
    gs://?*/?* | /*) ;;
    *) fail "--workdir=$workdir: wanted is a folder in a bucket, gs://BUCKET/RUN, or on a mount of all, /mnt/RUN" ;;
  esac
  if [[ $workdir != gs://* ]] && [ "$hosts" -eq 1 ]; then
    echo "warning: --workdir=$workdir is on the machine and goes with it, unless it is a mount" >&2
  fi
  variables >/dev/null
}

# ------------------------------------------------------------------------------------------------------- verbs
verb_create() {
  echo "$generation:$shape in $zone: $chips chips on $hosts x $machine, --pay=$pay"
  if [ -e "$record/create" ] && [ -z "$dry_run" ]; then
    fail "$name was created before, with $(cat "$record/create"); take another name, or bash launch/tpu.sh delete $name"
  fi
  after_asking create_new "This costs $chips chip-hours an hour (cloud.google.com/tpu/pricing) until it is deleted."
  if [ -z "$dry_run" ]; then echo "next: bash launch/tpu.sh run $name --workdir=gs://BUCKET/RUN --config=..."; fi
}

create_new() {
  if [ "$mode" = run ]; then
    mkdir -p "$record"
    quoted "${given[@]}" >"$record/create"
  fi
  create_and_wait
}

verb_status() {
  judge
  echo "$name: $state${detail:+ ($detail)}: $generation:$shape, $hosts x $machine, --pay=$pay, $zone"
  case $state in
    preempted | absent | failed) [ "$mode" = print ] || echo "to get it back: bash launch/tpu.sh resume $name" ;;
    ready)
      find_hosts
      everywhere on 'if cd unifusion_jax 2>/dev/null; then bash launch/host.sh status; fi' ;;
  esac
}

verb_run() {
  check_run
  start_run
  if [ "$mode" = run ]; then quoted "${given[@]}" >"$record/run"; fi
}

verb_logs() {
  if [ -z "$host" ] && [ "$hosts" -gt "$HOSTS_AT_ONCE" ]; then
    echo "host 0 of $hosts; --host=N shows another, and bash launch/tpu.sh status $name the last line of each" >&2
    host=0
  fi
  find_hosts
  everywhere on 'cd unifusion_jax && bash launch/host.sh logs'
}

verb_stop() {
  find_hosts
  everywhere on 'cd unifusion_jax && bash launch/host.sh stop'
}

verb_ssh() {
  host=${host:-0}
  find_hosts
  local send=${backend}_remote
  if [ "$mode" = print ]; then send=printed_remote; fi
  "$send" "${names[0]}" "${arguments[*]}"
}

delete_all() {
  left=
  "${backend}_delete"
  [ -z "$left" ] || fail "some of $name is left and may cost money; again: bash launch/tpu.sh delete $name"
  if [ "$mode" = run ]; then rm -f "$record/ready"; fi
}

verb_delete() {
  after_asking delete_all "This deletes $name ($generation:$shape in $zone) with its disks; what is in buckets stays."
  if [ -z "$dry_run" ]; then rm -rf "$record"; fi
}

# Deletes what is left, creates anew and runs the same command in the same workdir.
bring_back() {
  delete_all
  create_and_wait
  if [ -n "$workdir" ]; then start_run; fi
}

verb_resume() {
  [ -n "$workdir" ] || echo "warning: nothing was run on $name yet; it is only created again" >&2
  if [ -z "$dry_run" ]; then
    judge
    case $state:$watch in
      ready:) fail "$name is there and was not taken; bash launch/tpu.sh run $name ... starts training on it" ;;
      waiting:*) fail "$name is still asked for ($detail); bash launch/tpu.sh status $name looks again" ;;
    esac
    [ -e "$record/create" ] || [ -z "$watch" ] || fail "resume --watch wants the record of create, which is not here"
    echo "$name: $state${detail:+ ($detail)}"
  fi
  if [ -z "$watch" ]; then
    after_asking bring_back "This creates $name again and costs $chips chip-hours an hour until it is deleted."
  else
    after_asking watch_over "This creates $name again as often as it is taken; it costs $chips chip-hours an hour."
  fi
}

# What cannot be seen now, for want of a network, is looked at again; what cannot be had now is asked for again.
watch_over() {
  local seen
  if [ "$mode" = print ]; then
    bring_back
    return
  fi
  while :; do
    seen=$(judge; echo "$state") || seen=unknown
    case $seen in
      ready)
        seen=$(find_hosts; "${backend}_remote" "${names[0]}" 'cd unifusion_jax && bash launch/host.sh status') || seen=
        case $seen in
          *'exit code 0') echo "$seen"; return ;;
          *'exit code'*) fail "$seen; bash launch/tpu.sh logs $name" ;;
        esac ;;
      preempted | absent | failed)
        echo "$(date -u +%FT%TZ) $name: $seen; it is brought back ..."
        bash "${BASH_SOURCE[0]}" resume "$name" --yes || true ;;
    esac
    sleep $((4 * POLL_SECONDS))
  done
}

# ------------------------------------------------------------------------------------------------------ arguments
# What create or run was told before, for a verb that is not told it again.
recall() {
  if [ -e "$record/$1" ]; then
    local words
    eval "words=($(cat "$record/$1"))"
    parse "${words[@]}"
  fi
}

parse() {
  local word value
  while [ $# -gt 0 ]; do
    word=$1 value=${1#*=}
    shift
    case $word in
      --topology=*) topology=$value ;;
      --zone=*) zone=$value ;;
      --project=*) project=$value ;;
      --pay=*) pay=$value ;;
      --reservation=*) reservation=$value ;;
      --max-run=*) max_run=$value ;;
      --wait=*) wait_for=$value ;;
      --machine=*) given_machine=$value ;;
      --image=*) image=$value ;;
      --disk=*) disk=$value ;;
      --create-flags=*) read -ra create_flags <<<"$value" ;;
      --ssh-flags=*) read -ra ssh_flags <<<"$value" ;;
      --workdir=*) workdir=$value ;;
      --ref=*) ref=$value ;;
      --env=*) exports+=("$value") ;;
      --host=*) host=$value ;;
      --restart) restart=1 ;;
      --watch) watch=1 ;;
      --dry-run) dry_run=1 ;;
      --yes) yes=1 ;;
      --) arguments+=("$@"); return ;;
      *)
        if [ "$verb" != run ] && [ -z "${recalling:-}" ]; then
          fail "$verb knows no $word; bash launch/tpu.sh --help lists what there is"
        fi
        arguments+=("$word") ;;
    esac
  done
}

# The head of this file.
usage() {
  sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  if [ "$verb" = --help ]; then exit 0; else exit 2; fi
}

main() {
  verb=${1:-} name=${2:-}
  case $verb in
    create | status | run | logs | ssh | stop | resume | delete) ;;
    *) usage ;;
  esac
  [[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] || fail "$verb '$name': wanted is a name of small letters, digits" \
    "and dashes, as in bash launch/tpu.sh $verb edit-8b"
  given=("${@:3}")
  record=${LAUNCH_RECORDS:-$root/.cache/launch}/$name
  topology='' zone='' project='' given_machine='' image='' disk=200GB
  pay=on-demand reservation='' max_run='' wait_for=2h
  workdir='' ref='' exports=() restart='' arguments=() host='' watch='' dry_run='' yes=''
  create_flags=() ssh_flags=() made=() left=''
  if [ "$verb" != create ]; then recalling=1 recall create; yes='' dry_run=''; fi
  if [ "$verb" = resume ]; then recalling=1 recall run; yes='' dry_run=''; fi
  if [ "$verb" != resume ]; then arguments=(); fi
  parse "${given[@]}"
  [ -n "$topology" ] || fail "$verb $name wants a slice: --topology=v6e:4x4; there is no record here of what $name is"
  [ -n "$zone" ] || fail "$verb $name wants a zone: --zone=us-east5-a (cloud.google.com/tpu/docs/regions-zones)"
  slice "$topology" "$given_machine"
  software=${image:-$software}
  terms
  seconds "$wait_for" >/dev/null
  if [ "$api" = queued ]; then backend=queued; elif [ "$hosts" -eq 1 ]; then backend=vm; else backend=group; fi
  of_project=(${project:+"--project=$project"})
  place=("--zone=$zone" "${of_project[@]}")
  bundle=unifusion_jax.tar.gz
  mode=$([ -n "$dry_run" ] && echo print || echo run)
  [ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "there is no gcloud here; cloud.google.com/sdk/docs/install"
  "verb_$verb"
}

main "$@"
