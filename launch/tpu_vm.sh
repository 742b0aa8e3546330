#!/usr/bin/env bash
# Runs the project on all hosts of a Cloud TPU VM.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

usage() {
  cat <<'USAGE'
usage: launch/tpu_vm.sh COMMAND NAME ZONE [ARGS]

  setup NAME ZONE          copies the checkout's commit to every host of the TPU VM and installs it there
  run NAME ZONE ARGS       starts ARGS on every host: -m blockattn.train.distill --config ... --workdir ...
                           It goes on when this terminal is gone; started again, it goes on from the newest checkpoint
  logs NAME ZONE           what the run printed, of every host, as it comes
  status NAME ZONE         says of every host whether it runs, or its exit code
  stop NAME ZONE           SIGTERM to the run: it saves and ends with code 75
  --help                   this text

A trainer gets --multihost=auto. All hosts have to see the workdir, such as a Filestore or a bucket through GCS FUSE. The TPU
VM is yours to make and to delete:

  gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v5litepod-32 --version=v2-alpha-tpuv5-lite

Environment: TPU_ENV, what the run shall find in its environment, as a shell reads it. A value may have blanks, and goes
on up to the next NAME=. It travels in a file, so that no list of processes shows it:

  TPU_ENV='BLOCKATTN_DATA=/mnt/data WANDB_API_KEY=... XLA_FLAGS=--xla_dump_to=/tmp/dump --xla_dump_hlo_as_text'
USAGE
}

say() { printf 'tpu_vm.sh: %s\n' "$*" >&2; }

fail() {
  say "$@"
  exit 1
}

# Runs a shell command on every host of the TPU VM.
everywhere() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

setup() {
  local bundle
  [ -z "$(git -C "$root" status --porcelain --untracked-files=no)" ] ||
    say "changes that are not committed stay here; the hosts get $(git -C "$root" rev-parse --short HEAD)"
  bundle=$(mktemp -d)/blockattn.bundle
  git -C "$root" bundle create --quiet "$bundle" HEAD
  gcloud compute tpus tpu-vm scp "$bundle" "$name:blockattn.bundle" --zone="$zone" --worker=all
  rm -r "$(dirname "$bundle")"
  # A fresh clone keeps the commit, which the hosts compare when a run starts; the environment of an earlier one stays.
  everywhere 'set -e
    rm -rf blockattn.new && git clone --quiet blockattn.bundle blockattn.new
    if [ -d blockattn/.venv ]; then mv blockattn/.venv blockattn.new/; fi
    rm -rf blockattn && mv blockattn.new blockattn
    cd blockattn && BLOCKATTN_EXTRAS=tpu ./launch/local.sh -c "import jax; print(jax.__version__)"'
}

# Words as a shell on the other side reads them back.
quoted() { printf '%q ' "$@"; }

# Lines `export NAME=VALUE` of what TPU_ENV holds.
environment() {
  local words=() word name='' value=''
  # xargs reads quotes and blanks as a shell does, and runs nothing of it.
  xargs printf '%s' <<<"${TPU_ENV:-}" >/dev/null 2>&1 || fail 'TPU_ENV: a quote has no end'
  while IFS= read -r -d '' word; do words+=("$word"); done < <(xargs printf '%s\0' <<<"${TPU_ENV:-}")
  for word in ${words[@]+"${words[@]}"}; do   # bash before 4.4, as on a Mac, takes an empty list for an unknown name
    if [[ $word =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; then
      [ -z "$name" ] || printf 'export %s=%q\n' "$name" "$value"
      name=${word%%=*} value=${word#*=}
    elif [ -z "$word" ]; then
      continue   # of an empty TPU_ENV
    else
      [ -n "$name" ] || fail "TPU_ENV begins with $word; give NAME=VALUE ..."
      value+=" $word"
    fi
  done
  [ -z "$name" ] || printf 'export %s=%q\n' "$name" "$value"
}

run() {
  [ $# -gt 0 ] || fail 'nothing to run: add -m blockattn.train.distill --config ... --workdir ...'
  case "$*" in
    *--multihost*) ;;
    '-m blockattn.train.'*) set -- "$@" --multihost=auto ;;
  esac
  local folder exports
  exports=$(environment)
  folder=$(mktemp -d)   # for this user alone
  printf '%s\n' "$exports" >"$folder/run.env"
  gcloud compute tpus tpu-vm scp "$folder/run.env" "$name:run.env" --zone="$zone" --worker=all
  rm -r "$folder"
  # What is started has its own session, so that it outlives the connection; its exit code is kept for `status`.
  everywhere "set -e
    chmod 600 ~/run.env
    cd ~/blockattn || exit
    if [ -s ~/run.pid ] && kill -0 \$(cat ~/run.pid) 2>/dev/null; then
      rm ~/run.env
      echo 'a run is under way; stop it first' >&2
      exit 1
    fi
    rm -f ~/run.code
    export BLOCKATTN_EXTRAS=tpu PYTHONUNBUFFERED=1
    . ~/run.env && rm ~/run.env
    setsid nohup bash -c $(quoted "$(quoted ./launch/local.sh "$@")& echo \$! >~/run.pid; wait \$!; echo \$? >~/run.code") >~/run.log 2>&1 </dev/null &
    sleep 1"
}

[ $# -gt 0 ] || {
  usage >&2
  exit 2
}
command=$1
case $command in
  -h | --help | help)
    usage
    exit
    ;;
  setup | run | logs | status | stop) ;;
  *) fail "no command $command; see launch/tpu_vm.sh --help" ;;
esac
[ $# -ge 3 ] || fail "$command needs NAME and ZONE of the TPU VM"
command -v gcloud >/dev/null || fail 'no gcloud here; install it: https://cloud.google.com/sdk/docs/install'
name=$2 zone=$3
shift 3
# What stands in single quotes is for the hosts to expand.
# shellcheck disable=SC2016
case $command in
  setup) setup ;;
  run) run "$@" ;;
  logs) everywhere 'tail -n +1 -F ~/run.log | sed -u "s/^/[$(hostname)] /"' ;;
  status)
    everywhere 'if [ -e ~/run.code ]; then echo "$(hostname): ended with code $(cat ~/run.code)"
      elif [ -s ~/run.pid ] && kill -0 $(cat ~/run.pid) 2>/dev/null; then echo "$(hostname): runs"
      else echo "$(hostname): no run"; fi'
    ;;
  stop) everywhere 'kill -TERM $(cat ~/run.pid)' ;;
esac
