#!/usr/bin/env bash
# Runs one job on every host of a TPU VM slice, or of several slices, through gcloud.
#
#   launch/tpu_vm.sh --name=NAME --zone=ZONE [--setup] --gin_file=promot.gin --workdir=/mnt/shared/run [--gin.NAME=VALUE ...]
#
#   --name=NAME           the TPU VM, a slice of any size
#   --queued_resource=ID  instead of --name: all slices of a queued resource (multi-slice)
#   --zone=ZONE           zone of the TPU VM
#   --project=PROJECT     of the cloud (default: gcloud's own)
#   --setup               first copies the committed state of this checkout to every host and installs it there
#   --restarts=R          starts again up to R times after a preemption whose step was saved, exit status 75 (default 10)
#   --gcloud=OPTION       one more option for every gcloud command, for instance --gcloud=--tunnel-through-iap; may repeat
#   --dry_run             prints the commands and runs nothing
#
# All other arguments go to promot_jax.main, whose processes find each other. The workdir has to be on a file system that
# every host has mounted. Each host also keeps its output in ~/promot_jax/host.log.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

option=([name]='' [queued_resource]='' [zone]='' [project]='' [setup]=no [restarts]=10)
repeatable=gcloud
parse "$@"
need zone
need_numbers 0 restarts
need_passed --gin_file= "a gin file that says what to run"
need_passed --workdir= "a folder on a file system that every host has mounted"
if [[ ${option[name]} && ! ${option[queued_resource]} ]]; then
  target=${option[name]} kind=tpu-vm which=(--worker=all)
elif [[ ${option[queued_resource]} && ! ${option[name]} ]]; then
  target=${option[queued_resource]} kind=queued-resources which=(--node=all --worker=all)
else
  die "give either --name=NAME, of a TPU VM, or --queued_resource=ID."
fi
where=("${which[@]}" "--zone=${option[zone]}" ${option[project]:+"--project=${option[project]}"} ${more[@]+"${more[@]}"})

# Runs a line of shell on every host.
everywhere() {
  run gcloud compute tpus "$kind" ssh "$target" "${where[@]}" "--command=$1"
}

if [[ ${option[setup]} == yes ]]; then
  # A file of this user alone: other users may run this script at the same time.
  archive=${TMPDIR:-/tmp}/promot_jax-$(id -u).tar.gz
  run git -C "$ROOT" archive --format=tar.gz --prefix=promot_jax/ "--output=$archive" HEAD
  run gcloud compute tpus "$kind" scp "$archive" "$target:promot_jax.tar.gz" "${where[@]}"
  # The system's Python may be older than 3.11: uv brings one.
  everywhere "rm -rf promot_jax/promot_jax promot_jax/tasks promot_jax/gin && tar -xzf promot_jax.tar.gz && cd promot_jax && python3 -m pip install --user --upgrade uv && \
~/.local/bin/uv venv --clear --python 3.12 .venv && ~/.local/bin/uv pip install --python .venv/bin/python -e '.[tpu]'"
fi

# tee outlives the SIGTERM of a machine that shuts down: the run writes to it while it saves.
job="cd promot_jax && $(quoted .venv/bin/python -m promot_jax.main "${passed[@]}")"
job+=' > >(trap "" TERM; exec tee -a host.log) 2>&1'
for ((attempt = 0; ; attempt++)); do
  status=0
  everywhere "$job" || status=$?
  ((status == PREEMPTED && attempt < option[restarts])) || exit "$status"
  echo "tpu_vm.sh: preempted and saved; starting again, $((attempt + 1)) of ${option[restarts]}." >&2
done
