# shellcheck shell=bash disable=SC2034,SC2154  # variables from and for tpu.sh
# Sourced by tpu.sh: the ways to pay, the commands of gcloud that get, look at and remove a slice by each of three ways,
# and what their errors mean. Flags are those of gcloud's own --help and of docs.cloud.google.com/tpu/docs
# (consume-reservation-compute, request-using-flex-start, spot-compute, queued-resources) and
# docs.cloud.google.com/compute/docs/tpus/create-tpu-mig-multi-host-slice, read 2026-11-27.

# ---------------------------------------------------------------------------------------------------- ways to pay
# Sets track and flags: what the API takes for it, an instance or its template, or a queued resource.
terms() {
  local limit="--max-run-duration=${max_run:-24h}" delete=--instance-termination-action=DELETE
  track=() flags=()
  case $api:$pay in
    compute:on-demand)  flags=(--provisioning-model=STANDARD ${max_run:+"$limit" "$delete"}) ;;
    compute:spot)       flags=(--provisioning-model=SPOT)
                        if [ -n "$max_run" ]; then flags+=("$limit" "$delete")
                        else flags+=(--instance-termination-action=STOP); fi ;;
    compute:flex-start) flags=(--provisioning-model=FLEX_START "$limit" "$delete") ;;
    compute:reserved)   flags=(--provisioning-model=RESERVATION_BOUND "$delete" --reservation-affinity=specific
                               "--reservation=$reservation") ;;
    queued:on-demand)   ;;
    queued:spot)        flags=(--spot) ;;
    queued:flex-start)  track=(alpha) flags=(--provisioning-model=flex-start "$limit") ;;
    queued:reserved)    if [ -n "$reservation" ]; then track=(alpha) flags=("--reservation=$reservation")
                        else flags=(--reserved); fi ;;
    *) fail "--pay=$pay: wanted is on-demand, spot, flex-start or reserved" ;;
  esac
  case $api:$pay:${reservation:+R}:${max_run:+M} in
    compute:reserved::*) fail "--pay=reserved wants the reservation: --reservation=projects/P/reservations/R" ;;
    *:reserved:*:M | queued:on-demand:*:M | queued:spot:*:M)
      fail "--max-run=$max_run: $generation with --pay=$pay has no end of its own; bash launch/tpu.sh delete ends it" ;;
    *:reserved:*) ;;
    *:R:*) fail "--reservation=$reservation goes with --pay=reserved, and this is --pay=$pay" ;;
  esac
  if [ -n "$max_run" ]; then seconds "$max_run" >/dev/null; fi
}

# ------------------------------------------------------------------------------------------------ running commands
# What a command of gcloud printed last, and whether it failed.
said='' refused=

# What changes something: printed where mode is print, else run, its output in said and refused set if it fails.
act() {
  said='' refused=
  if [ "$mode" = print ]; then echo "  $(quoted "$@")"; return; fi
  said=$("$@" 2>&1) || refused=1
}

# What only looks: the same, and said is empty where the thing looked for is not there.
look() {
  act "$@"
  if [ -n "$refused" ]; then
    not_there || fail "$(quoted "${@:1:5}") ... failed: $said"
    said=''
  fi
}

not_there() { grep -qiE 'not ?found|does not exist' <<<"$said"; }

# The sentence for what gcloud said, and what to do.
sentence() {
  local tier
  case $said in
    *GPUS_ALL_REGIONS*)
      echo "the project's quota GPUS_ALL_REGIONS is used up or 0, and then no TPU starts either; raise it to the" \
        "number of chips: console.cloud.google.com/iam-admin/quotas" ;;
    *QUOTA* | *uota*exceed* | *exceed*uota* | *uota\ limit*)
      case $pay in spot | flex-start) tier=preemptible ;; *) tier=$pay ;; esac
      echo "the project's quota for $tier $generation in ${zone%-*} is too small for $chips chips; ask for more at" \
        "console.cloud.google.com/iam-admin/quotas, or take a smaller --topology or another --zone" ;;
    *RESOURCE_POOL_EXHAUSTED* | *STOCKOUT* | *enough\ resources* | *more\ capacity* | *nsufficient*capacity* | \
      *currently\ unavailable*)
      echo "no $generation:$shape is free in $zone with --pay=$pay; try another --zone" \
        "(cloud.google.com/tpu/docs/regions-zones), a smaller --topology, or --pay=flex-start, which waits for one" ;;
    *PERMISSION_DENIED* | *Required\ *permission* | *SERVICE_DISABLED* | *has\ not\ been\ used\ in\ project*)
      echo "the account may not do that, or the project's API is off; the message names which to grant or to enable" ;;
    *unrecognized\ arguments* | *nvalid\ choice*)
      echo "this gcloud is older than one of the flags; gcloud components update" ;;
    *already\ exists*)
      echo "something called $name is there already; take another name, or bash launch/tpu.sh delete $name" ;;
    *) return 1 ;;
  esac
}

# Ends in a sentence after a refusal; what this create has made so far is removed again.
give_up() {
  local words reason=$said
  words=$(sentence) || words=$1
  left=
  for each in "${made[@]}"; do "$each"; done
  if [ -n "$left" ]; then
    words+="; some of it could not be removed and may cost money: bash launch/tpu.sh delete $name"
  elif [ ${#made[@]} -gt 0 ]; then
    words+='; the request is withdrawn'
  fi
  if [ "$verb" = create ] && [ -z "$left" ]; then rm -rf "$record"; fi
  fail "$words${reason:+; gcloud said: $(head -c 600 <<<"$reason")}"
}

# A step of create: TAKE_BACK is the function that removes what it makes.
step() {
  local take_back=$1
  shift
  if [ "$mode" = run ]; then echo "$(quoted "${@:1:5}") ..."; fi
  act "$@"
  if [ "$mode" = print ]; then return; fi
  if [ -n "$refused" ]; then give_up "$(quoted "${@:1:5}") ... failed"; fi
  made=("$take_back" "${made[@]}")
}

# A step of delete.
gone() {
  act "$@"
  if [ -z "$refused" ]; then return; fi
  if ! not_there; then
    echo "$(quoted "$@") failed: $said" >&2
    left=1
  fi
}

# after_asking FUNCTION SENTENCE: prints what FUNCTION will run, asks, and runs it.
after_asking() {
  mode=print
  "$1"
  if [ -n "$dry_run" ]; then return; fi
  if [ -z "$yes" ]; then
    agree "$2"
  fi
  mode=run
  "$1"
}

seconds() {
  case $1 in
    *[!0-9smhd]* | '' | [smhd]* | *[smhd]?*)
      fail "$1 is no duration; wanted is a number with s, m, h or d, as in 90s or 4h" ;;
    *m) echo $((${1%m} * 60)) ;;
    *h) echo $((${1%h} * 3600)) ;;
    *d) echo $((${1%d} * 86400)) ;;
    *) echo "${1%s}" ;;
  esac
}

# --------------------------------------------------------------------- queued resources of the Cloud TPU API (v5e)
# Each of the three backends: create; state, which sets state and detail; delete; hosts, one a line; remote; copy.
queued_create() {
  step queued_delete gcloud "${track[@]}" compute tpus queued-resources create "$name" "--node-id=$name" \
    "${place[@]}" "--accelerator-type=v5litepod-$chips" "--runtime-version=$software" "${flags[@]}" \
    "--valid-until-duration=$wait_for" --async "${create_flags[@]}"
}

queued_state() {
  look gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    '--format=value(state.state,state.failedData.error.message)'
  detail=${said%%$'\t'*}
  case $detail in
    ACTIVE) state=ready ;;
    SUSPEND*) state=preempted ;;
    FAILED) state=failed ;;
    '') state=absent ;;
    *) state=waiting ;;
  esac
}

queued_delete() { gone gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet; }
queued_hosts() { said=$(seq 0 $((hosts - 1))); }
queued_remote() {
  gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" "--worker=$1" "${ssh_flags[@]}" ${2:+"--command=$2"}
}
queued_copy() { gcloud compute tpus tpu-vm scp "$2" "$name:$3" "${place[@]}" "--worker=$1" "${ssh_flags[@]}"; }

# ------------------------------------------------------------------------------------- Compute Engine: one machine
# Sets hardware, flags of an instance and of a template.
describe_hardware() {
  hardware=("--machine-type=$machine" --image-project=ubuntu-os-accelerator-images "--image-family=$software"
            "--boot-disk-size=$disk" --maintenance-policy=TERMINATE --scopes=cloud-platform)
}

vm_create() {
  local queue=() longest
  describe_hardware
  if [ "$pay" = flex-start ]; then
    longest=$(seconds "$wait_for")
    queue=("--request-valid-for-duration=$((longest < 7200 ? longest : 7200))s")
  fi
  step vm_delete gcloud compute instances create "$name" "${place[@]}" "${hardware[@]}" "${flags[@]}" "${queue[@]}" \
    "${create_flags[@]}"
}

vm_state() {
  look gcloud compute instances describe "$name" "${place[@]}" '--format=value(status)'
  detail=$said
  case $said in
    RUNNING) state=ready ;;
    STOP* | SUSPEND* | TERMINATED) state=preempted ;;
    '') state=absent ;;
    *) state=waiting ;;
  esac
}

vm_delete() { gone gcloud compute instances delete "$name" "${place[@]}" --quiet; }
vm_hosts() { said=$name; }
vm_remote() { gcloud compute ssh "$1" "${place[@]}" "${ssh_flags[@]}" ${2:+"--command=$2"}; }
vm_copy() { gcloud compute scp "$2" "$1:$3" "${place[@]}" "${ssh_flags[@]}"; }

# --------------- Compute Engine: a managed instance group, whose workload policy joins its machines to one slice
group_create() {
  local region=${zone%-*} owner path
  owner=$(owning_project)
  path=projects/$owner/regions/$region
  describe_hardware
  step group_delete_policy gcloud compute resource-policies create workload-policy "$name" "--region=$region" \
    "${of_project[@]}" --type=HIGH_THROUGHPUT "--accelerator-topology=$shape" --accelerator-topology-mode=AUTO_CONNECT
  step group_delete_template gcloud compute instance-templates create "$name" "--instance-template-region=$region" \
    "${of_project[@]}" "${hardware[@]}" "${flags[@]}" "${create_flags[@]}"
  step group_delete_group gcloud compute instance-groups managed create "$name" "${place[@]}" --size=0 \
    --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing \
    "--template=$path/instanceTemplates/$name" "--workload-policy=$path/resourcePolicies/$name"
  step : gcloud compute instance-groups managed resize "$name" "${place[@]}" "--size=$hosts"
}

# Policy and template go by paths with the project in them.
owning_project() {
  local owner=$project
  if [ -z "$owner" ] && [ -n "$dry_run" ]; then owner=PROJECT; fi
  if [ -z "$owner" ]; then owner=$(gcloud config get-value project 2>/dev/null) || owner=; fi
  case $owner in
    '' | '(unset)') fail "gcloud has no project; --project=P, or gcloud config set project P" ;;
    *) echo "$owner" ;;
  esac
}

group_list() {
  look gcloud compute instance-groups managed list-instances "$name" "${place[@]}" '--format=value(name,instanceStatus)'
}

group_state() {
  local running absent=
  group_list
  if [ -n "$refused" ]; then absent=1; fi
  running=$(grep -cw RUNNING <<<"$said" || true)
  detail="$running of $hosts hosts"
  if [ -n "$absent" ]; then state=absent detail=
  elif [ "$running" -eq "$hosts" ]; then state=ready
  elif grep -qE 'STOP|SUSPEND|TERMINATED' <<<"$said"; then state=preempted
  else
    state=waiting
    look gcloud compute instance-groups managed list-errors "$name" "${place[@]}" --limit=1 \
      '--format=value(error.code,error.message)'
    case $said in
      '') ;;
      *QUOTA* | *uota*exceed* | *PERMISSION*) state=failed detail=$said ;;
      *) detail+=", last error: $(head -c 100 <<<"$said")" ;;
    esac
  fi
}

group_delete_group() { gone gcloud compute instance-groups managed delete "$name" "${place[@]}" --quiet; }
group_delete_template() {
  gone gcloud compute instance-templates delete "$name" "--region=${zone%-*}" "${of_project[@]}" --quiet
}
group_delete_policy() {
  gone gcloud compute resource-policies delete "$name" "--region=${zone%-*}" "${of_project[@]}" --quiet
}
group_delete() {
  group_delete_group
  group_delete_template
  group_delete_policy
}
group_hosts() { group_list; said=$(awk '{print $1}' <<<"$said" | sort -V); }
group_remote() { vm_remote "$@"; }
group_copy() { vm_copy "$@"; }
