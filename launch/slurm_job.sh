#!/usr/bin/env bash
# The batch script of launch/slurm.sh; sbatch copies it to the first node. Runs a command, and requeues the job when the
# command was preempted and has saved its step (exit status 75).
#
#   slurm_job.sh RESTARTS COMMAND [ARGUMENT ...]

set -euo pipefail

restarts=$1
shift
trap : TERM # survive the SIGTERM that ends the steps; with trap '' the command would ignore it as well
status=0
"$@" || status=$?
if ((status == 75 && ${SLURM_RESTART_COUNT:-0} < restarts)); then
  echo "slurm_job.sh: preempted and saved; requeued, $((${SLURM_RESTART_COUNT:-0} + 1)) of $restarts."
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
