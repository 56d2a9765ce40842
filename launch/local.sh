#!/usr/bin/env bash
# Runs one job as several processes on this machine, each with a few forced CPU devices: a small pod for tests.
#
#   launch/local.sh --processes=2 --devices=4 --gin_file=promot.gin --workdir=runs/two [--gin.NAME=VALUE ...]
#
#   --processes=N   number of processes (default 2); process 0 also writes to the terminal
#   --devices=M     CPU devices of each process (default 4)
#   --restarts=R    starts again up to R times after a preemption whose step was saved, exit status 75 (default 0)
#   --port=PORT     port of process 0, to which the others connect (default 12355)
#   --log_dir=DIR   folder of host_0.log, host_1.log ..., which are appended to (default runs/logs)
#   --grace=S       seconds after the failure of one process until the others are killed (default 30)
#   --python=PATH   Python to run (default python)
#   --dry_run       prints the commands and runs nothing
#
# All other arguments go to promot_jax.main. When a process fails, the others are ended and its status is returned.
# Ctrl-C and SIGTERM reach all processes as SIGTERM, so that they save; the second time they are killed.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

option=([processes]=2 [devices]=4 [restarts]=0 [port]=12355 [log_dir]=runs/logs [grace]=30 [python]=python)
parse "$@"
need log_dir python
need_numbers 1 processes devices port
need_numbers 0 restarts grace
need_passed --gin_file= "a gin file that says what to run"

pids=()  # of the processes that still run, by host
stopped= # exit status after Ctrl-C or SIGTERM, empty before

# Runs a line of shell, or prints it: redirections and & are part of what a dry run shows.
line() {
  if [[ $dry_run ]]; then printf '%s\n' "$1"; else eval "$1"; fi
}

# Sends a signal to the processes that still run.
signal() {
  ((${#pids[@]} == 0)) || kill "-$1" "${pids[@]}" 2>/dev/null || true
}

# Passes Ctrl-C or SIGTERM on to the processes; kills them the second time.
stop() {
  if [[ $stopped ]]; then signal KILL; else signal TERM; fi
  stopped=$1
}

start() {
  local host log command flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=${option[devices]}"
  line "mkdir -p $(quoted "${option[log_dir]}")"
  for ((host = 0; host < option[processes]; host++)); do
    command=$(
      quoted env JAX_PLATFORMS=cpu "XLA_FLAGS=$flags" "${option[python]}" -m promot_jax.main "${passed[@]}" \
        "--coordinator=127.0.0.1:${option[port]}" "--num_hosts=${option[processes]}" "--host_id=$host"
    )
    log=$(quoted "${option[log_dir]}/host_$host.log")
    # tee outlives the SIGTERM of a whole process group: the run writes to it while it saves.
    if ((host)); then
      line "$command >>$log 2>&1 &"
    else
      line "$command > >(trap '' TERM; exec tee -a $log) 2>&1 &"
    fi
    [[ $dry_run ]] || pids[host]=$!
  done
}

# Waits for all processes, and returns the status of the first that failed; the others are ended then.
finish() {
  local host code status=0 deadline=
  while ((${#pids[@]})); do
    for host in "${!pids[@]}"; do
      ! kill -0 "${pids[host]}" 2>/dev/null || continue
      code=0
      wait "${pids[host]}" || code=$?
      unset "pids[host]"
      if ((code == PREEMPTED)); then # the others save the same step and end by themselves
        ((status)) || status=$PREEMPTED
      elif ((code)) && [[ ! $deadline ]]; then
        status=$code deadline=$((SECONDS + option[grace]))
        echo "local.sh: process $host ended with status $code, see ${option[log_dir]}/host_$host.log." >&2
        signal TERM
      fi
    done
    if [[ $deadline ]] && ((SECONDS >= deadline)); then signal KILL; fi
    sleep 0.2 || true # Ctrl-C ends it
  done
  return "$status"
}

trap 'stop 130' INT
trap 'stop 143' TERM
for ((attempt = 0; ; attempt++)); do
  start
  if [[ $dry_run ]]; then
    line wait
    exit 0
  fi
  status=0
  finish || status=$?
  if [[ $stopped ]]; then exit "$((status == 0 || status == PREEMPTED ? status : stopped))"; fi
  ((status == PREEMPTED && attempt < option[restarts])) || exit "$status"
  echo "local.sh: preempted and saved; starting again, $((attempt + 1)) of ${option[restarts]}." >&2
done
