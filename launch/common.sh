# Functions of all launchers: options, error messages, and one code path for a dry run and a real one. Sourced, not run.
#
# A launcher declares `option` (its options and their defaults; the default "no" makes a switch) and `repeatable` (the
# one option that may be given several times, or nothing). It calls `parse "$@"`, and then `run` for each command.
# `parse` puts the arguments of promot_jax.main (its flags, and everything after --) into `passed`, and the values of the
# repeatable option into `more`.
# shellcheck shell=bash disable=SC2034  # the launchers read the variables that are assigned here

# shellcheck disable=SC2034 # gke.sh reads it
LOST=76 # exit status of a host that ends because another host was lost
PREEMPTED=75 # exit status of a run that was preempted and has saved its step; the same command resumes it
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
declare -A option=()
repeatable=
passed=()
more=()
dry_run=

# Prints an error message on stderr and exits with the status of a wrong command line.
die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "bash 4.4 or newer is needed, not $BASH_VERSION."

# Prints words as a shell takes them: bare where that is safe, and otherwise in quotes.
quoted() {
  local word words=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  printf '%s\n' "${words[*]}"
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ $dry_run ]]; then
    quoted "$@"
  else
    command -v "$1" >/dev/null || die "$1 is not installed on this machine."
    "$@"
  fi
}

# Reads the command line; see above.
parse() {
  local argument name
  while (($#)); do
    argument=$1 name=${1%%=*} name=${name#--}
    shift
    case $argument in
      --help | -h) sed -n '2,/^$/ { s/^# \{0,1\}//; p; }' "$0" && exit 0 ;;
      --dry_run) dry_run=1 ;;
      --gin_file=?* | --gin.?*=* | --workdir=?* | --*_timeout=?* | --preemption_notice=?*) passed+=("$argument") ;;
      --) passed+=("$@") && return ;;
      --"$repeatable"=*) more+=("${argument#*=}") ;;
      --*=*)
        [[ ${option[$name]-no} != no ]] || die "there is no option --$name=VALUE; --help lists those there are."
        option["$name"]=${argument#*=}
        ;;
      --*)
        [[ ${option[$name]-} == no ]] || die "$argument has no value, or is no option; see --help."
        option["$name"]=yes
        ;;
      *) die "'$argument' is no option; settings are given as --gin.NAME=VALUE, gin files as --gin_file=FILE." ;;
    esac
  done
}

# Dies unless each option of the given names has a value.
need() {
  local name
  for name in "$@"; do
    [[ ${option[$name]} ]] || die "--$name=VALUE is missing; --help says what it is."
  done
}

# Dies unless each option of the given names is a whole number, at least the first argument.
need_numbers() {
  local name least=$1
  shift
  for name in "$@"; do
    if [[ ! ${option[$name]} =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((option[$name] < least)); then
      die "--$name is a whole number of at least $least, not '${option[$name]}'."
    fi
  done
}

# Dies unless an argument in `passed` begins with the first argument; the second argument describes it.
need_passed() {
  local argument
  for argument in ${passed[@]+"${passed[@]}"}; do
    [[ $argument != "$1"* ]] || return 0
  done
  die "$1VALUE is missing; it is $2."
}
