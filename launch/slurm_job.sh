#!/usr/bin/env bash
# The batch script of launch/slurm.sh, which sbatch copies to the first node: runs a command, and requeues the job when
# the command was preempted and has saved, exit status 75.
#
#   slurm_job.sh RESTARTS COMMAND [ARGUMENT ...]

set -euo pipefail

restarts=$1
shift
trap : TERM # survive what ends the steps; a signal that is ignored would be ignored by the command as well
status=0
"$@" || status=$?
if ((status == 75 && ${SLURM_RESTART_COUNT:-0} < restarts)); then
  echo "slurm_job.sh: preempted and saved; requeued, $((${SLURM_RESTART_COUNT:-0} + 1)) of $restarts."
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
