#!/usr/bin/env bash
# Builds a SeqIO cache of tasks with Apache Beam. Every host then reads the cache.
#
#   launch/cache_tasks.sh --module=promot_jax.tasks.paper --tasks=rte,wmt14_enfr --cache_dir=gs://bucket/cache
#
#   --module=MODULE   the module that registers the tasks
#   --tasks=A,B       the tasks, as regular expressions
#   --cache_dir=DIR   gets a folder per task; set SEQIO_CACHE_DIRS to it
#   --shards=N        files per split (default 64); at least as many as hosts read it
#   --beam=OPTION     one option of the Beam pipeline, for instance --beam=--runner=DataflowRunner; may repeat
#   --python=PATH     Python with promot_jax[cache] installed (default python)
#   --dry_run         prints the command and runs nothing
#
# Tasks with exemplars are read from the cache of the task itself. Tasks that are cached already are left as they are.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

option=([module]='' [tasks]='' [cache_dir]='' [shards]=64 [python]=python)
repeatable=beam
parse "$@"
need module tasks cache_dir python
need_numbers 1 shards
((${#passed[@]} == 0)) || die "'${passed[0]}' belongs to promot_jax.main: nothing is trained here."
pipeline=$(IFS=, && echo "${more[*]-}")

run "${option[python]}" -m seqio.scripts.cache_tasks_main "--module_import=${option[module]}" \
  "--tasks=${option[tasks]}" '--excluded_tasks=.*_[0-9]+shot' "--output_cache_dir=${option[cache_dir]}" \
  "--min_shards=${option[shards]}" "--pipeline_options=${pipeline:---runner=DirectRunner}" --alsologtostderr
