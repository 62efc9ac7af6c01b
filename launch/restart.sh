# shellcheck shell=bash
# Sourced by host.sh and gpu.sh: a command that is run again after a preemption or a crash, in the same workdir.

# again COMMAND...: runs it until its exit code is 0. 143 is a preemption that was saved, and it goes on at once. Any
# other code is a crash, of this host or of another: after three in a row within RESTART_QUICK seconds of their start it
# gives up, for a restart does not mend a wrong setting. SIGTERM and SIGINT to this shell end it with the command, which
# gets them itself: who ends a machine, or presses Ctrl-C, tells all processes, and a second signal would stop the save.
again() {
  local code started crashes=0 ending=
  trap 'ending=1' TERM INT
  while :; do
    code=0 started=$SECONDS
    "$@" || code=$?
    if [ "$code" -eq 0 ] || [ -n "$ending" ] || [ -e run.stop ]; then return "$code"; fi
    crashes=$((crashes + 1))
    if [ "$code" -eq 143 ] || [ $((SECONDS - started)) -ge "${RESTART_QUICK:-120}" ]; then crashes=0; fi
    if [ "$crashes" -eq 3 ]; then
      echo "error: exit code $code, for the third time within ${RESTART_QUICK:-120} s of its start; mend what it says" \
        "above, then run it again" >&2
      return "$code"
    fi
    echo "exit code $code; the same command again ..." >&2
    sleep "${RESTART_PAUSE:-10}"
  done
}
