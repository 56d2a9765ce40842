#!/usr/bin/env bash
# Runs one job on TPU slices of a GKE cluster, as an xpk workload.
#
#   launch/gke.sh --name=NAME --cluster=CLUSTER --tpu_type=v5litepod-64 --image=IMAGE \
#       --gin_file=promot.gin --workdir=/mnt/shared/run [--gin.NAME=VALUE ...]
#
#   --name=NAME        of the workload
#   --cluster=CLUSTER  an xpk cluster
#   --tpu_type=TYPE    type of a slice, as xpk names it
#   --slices=N         number of slices (default 1)
#   --image=IMAGE      an image with promot_jax[tpu] installed; launch/Dockerfile builds one
#   --zone=ZONE        of the cluster (default: gcloud's own)
#   --project=PROJECT  of the cloud (default: gcloud's own)
#   --restarts=R       starts again up to R times when a pod is lost, or was preempted and has saved (default 10)
#   --grace=S          seconds between SIGTERM and the end of a pod, to save the step (default 300)
#   --xpk=OPTION       one more option for xpk, for instance --xpk=--spot; may repeat
#   --dry_run          prints the command and runs nothing
#
# All other arguments go to promot_jax.main, whose processes find each other. The workdir has to be on a volume that every
# pod mounts (xpk storage attach). The script returns when the workload is queued: `xpk workload list` shows its state.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

option=(
  [name]='' [cluster]='' [tpu_type]='' [slices]=1 [image]='' [zone]='' [project]='' [restarts]=10 [grace]=300
)
repeatable=xpk
parse "$@"
need name cluster tpu_type image
need_numbers 1 slices
need_numbers 0 restarts grace
need_passed --gin_file= "a gin file that says what to run"
need_passed --workdir= "a folder on a volume that every pod mounts"
[[ ${passed[*]} != *$'\n'* ]] || die "xpk takes no value with a line break; put it into a gin file of the image."

# Restart on xpk's own statuses, on 75, and on 76 of hosts that lost another one, but not on others: a typo must not
# restart. With exec, SIGTERM reaches Python itself.
run xpk workload create "--workload=${option[name]}" "--cluster=${option[cluster]}" \
  ${option[zone]:+"--zone=${option[zone]}"} ${option[project]:+"--project=${option[project]}"} \
  "--tpu-type=${option[tpu_type]}" "--num-slices=${option[slices]}" "--docker-image=${option[image]}" \
  "--max-restarts=${option[restarts]}" "--restart-on-exit-codes=$PREEMPTED,$LOST" \
  "--termination-grace-period-seconds=${option[grace]}" ${more[@]+"${more[@]}"} \
  "--command=exec $(quoted python -m promot_jax.main "${passed[@]}")"
