#!/usr/bin/env bash
# Runs one job on GPU nodes, as a Slurm batch job.
#
#   launch/slurm.sh --nodes=4 --gpus_per_node=8 --sbatch=--time=12:00:00 --sbatch=--partition=gpu \
#       --gin_file=promot.gin --workdir=runs/four [--gin.NAME=VALUE ...]
#
#   --nodes=N             number of nodes
#   --gpus_per_node=G     GPUs that the job gets of each node
#   --process_per=WHAT    one process per "gpu" (default) or per "node"
#   --cpus_per_process=C  CPU cores of each process, for the data (default 4)
#   --restarts=R          requeues up to R times after a preemption, or the time limit, with the step saved (default 10)
#   --grace=S             seconds before the time limit at which the step is saved (default 300)
#   --sbatch=OPTION       one more option for sbatch, for instance --sbatch=--account=me; may repeat
#   --python=PATH         Python on the nodes (default python, of the environment that submits)
#   --dry_run             prints the command and runs nothing
#
# All other arguments go to promot_jax.main, whose processes find each other. The job runs in the current folder. Its
# workdir has to be on a file system that all nodes share. The script returns when the job is queued.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

option=(
  [nodes]='' [gpus_per_node]='' [process_per]=gpu [cpus_per_process]=4 [restarts]=10 [grace]=300 [python]=python
)
repeatable=sbatch
parse "$@"
need nodes gpus_per_node python
need_numbers 1 nodes gpus_per_node cpus_per_process
need_numbers 0 restarts grace
need_passed --gin_file= "a gin file that says what to run"

gpus=${option[gpus_per_node]} environment=()
case ${option[process_per]} in
  gpu) tasks=$gpus ;; # JAX takes the GPU with the task's number on its node, so Slurm must not hide the others
  node)
    tasks=1 # without JAX_LOCAL_DEVICE_IDS JAX would take one GPU only
    environment=(env "JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))")
    ;;
  *) die "--process_per is gpu or node, not '${option[process_per]}'." ;;
esac

# srun must not end the other processes at once: after a preemption some still save when the first has ended.
run sbatch "--nodes=${option[nodes]}" "--ntasks-per-node=$tasks" "--gpus-per-node=$gpus" \
  "--cpus-per-task=${option[cpus_per_process]}" --job-name=promot_jax --requeue --open-mode=append \
  "--signal=TERM@${option[grace]}" ${more[@]+"${more[@]}"} \
  "$ROOT/launch/slurm_job.sh" "${option[restarts]}" \
  srun --kill-on-bad-exit=0 --wait=300 --label "--cpus-per-task=${option[cpus_per_process]}" \
  ${environment[@]+"${environment[@]}"} "${option[python]}" -m promot_jax.main "${passed[@]}"
