#!/usr/bin/env bash
# Runs the project on this machine. All it needs is Python >= 3.11; the rest is installed into .venv on the first run.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
unavailable=69   # sysexits' name for it

usage() {
  cat <<'USAGE'
usage: launch/local.sh COMMAND

  demo [ARGS]          the whole method in one run: python -m tools.demo ARGS; `--model smollm2` on a real language model
  test [PYTEST ARGS]   the tests, on all cores (run in the checkout; -n 0 for one process)
  test-vllm [ARGS]     the tests of serving in vLLM, in an environment of their own, .venv-vllm (4 GB); the exit code is 69
                       where it cannot be installed
  lint                 ruff check
  types                pyright, of what pyproject.toml names
  docs [serve]         the documents, into build/site; `serve` shows them while they are written
  --processes N --devices M ARGS
                       a run of N processes with M simulated CPU devices each: ARGS as below, once per process
  sweep ARGS           the points of a config's sweep: python -m launch.sweep ARGS
  ARGS                 anything else goes to the environment's Python: -m blockattn.train ..., script.py, -c '...'
  --help               this text

The first run installs into .venv in the checkout, later runs start at once. The working directory stays yours, and the
checkout is on PYTHONPATH. Environment:

  PYTHON=python3.12          the Python to make .venv with (default: the first of python3.12, python3.11, python3)
  BLOCKATTN_EXTRAS=gpu       extras to install too: gpu, tpu, log, data, gguf, kernels-ci, separated by commas
  BLOCKATTN_TEST_DEVICE=1    let the tests use the machine's accelerator; without it they run on the CPU
  BLOCKATTN_VLLM=FOLDER      an environment for test-vllm, taken as it is
  BLOCKATTN_DATA=FOLDER      real documents for the tests marked `data`
  BLOCKATTN_SLOW=1           the tests marked `slow` too: whole runs, ten minutes more
  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
                             take the small CPU build of torch, which only the tests need
USAGE
}

say() { printf 'local.sh: %s\n' "$*" >&2; }

fail() {
  say "$@"
  exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Prints the Python to make the environment with.
find_python() {
  local name
  if [ -n "${PYTHON:-}" ]; then
    is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is no Python >= 3.11; name another one or unset it"
    echo "$PYTHON"
    return
  fi
  for name in python3.12 python3.11 python3 python; do
    if is_new_enough "$name"; then
      echo "$name"
      return
    fi
  done
  fail "no Python >= 3.11 found; install one (Debian, Ubuntu: apt-get install python3 python3-venv)" \
    "or name it: PYTHON=/path/to/python3.12 $0 ..."
}

make_venv() {
  local python
  python=$(find_python)
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make virtual environments; install the module:" \
      "apt-get install python3-venv (or $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'))"
  say "making $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv"
}

# What an installation depends on; a stamp that holds exactly this says that pip finished its work.
key() {
  echo "extras '$1' in $root"
  grep '^version' "$venv/pyvenv.cfg"
  cat "$root/setup.py"
}

stamp() { echo "$venv/installed-${1:-base}"; }

is_installed() { [ -x "$venv/bin/python" ] && key "$1" 2>/dev/null | cmp -s - "$(stamp "$1")"; }

# The environment may stand, and yet be of another Python than the one that PYTHON asks for.
is_asked_python() {
  [ -n "${PYTHON:-}" ] || return 0
  [ "$("$venv/bin/python" --version 2>/dev/null)" = "$("$PYTHON" --version 2>/dev/null)" ]
}

install() {
  local extras=$1
  if [ -e "$venv/installing" ]; then
    say "an earlier installation was interrupted; starting over"
    make_venv
  elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 || ! is_asked_python; then
    make_venv
  fi
  rm -f "$(stamp "$extras")"
  touch "$venv/installing"
  say "installing blockattn${extras:+[$extras]} into ${venv##*/} (once, a minute or two)"
  (cd "$root" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}") >&2 ||
    fail "pip could not install; its message stands above. The next run starts over."
  # vLLM asks for these, transformers loads what is there, and as built for CUDA they do not load beside torch for CPUs.
  [ "$extras" != vllm-ci ] || "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec >&2
  key "$extras" >"$(stamp "$extras")"
  rm -f "$venv/installing"
}

# Whether the environment serves: it may also hold more than is asked for.
is_ready() { is_asked_python && { is_installed "$1" || is_installed "$dev_extras"; }; }

# Installs blockattn with these extras, unless they are there. Of several runs at once, one installs, the others wait.
ensure() {
  is_ready "$1" && return
  if command -v flock >/dev/null; then
    exec 9>"$venv.lock"
    flock --nonblock 9 || {
      say "waiting for another installation into ${venv##*/} to end"
      flock 9
    }
  fi
  is_ready "$1" || install "$1"
  exec 9>&-
}

run_tests() {
  local workers=auto
  cd "$root"
  if [ "${BLOCKATTN_TEST_DEVICE:-0}" != 0 ]; then
    workers=0   # one process: each would claim most of the accelerator's memory
  else
    export JAX_PLATFORMS=cpu
    # One core per worker: threads of several workers on the same cores only wait for each other.
    export OMP_NUM_THREADS=1 XLA_FLAGS="${XLA_FLAGS:-} --xla_cpu_multi_thread_eigen=false"
  fi
  exec "$venv/bin/python" -m pytest -n "$workers" --dist worksteal "$@"
}

# One process: a server takes what memory there is, and `vllm` in a test's process has one engine at a time.
run_vllm_tests() {
  if [ -n "${BLOCKATTN_VLLM:-}" ]; then
    venv=$BLOCKATTN_VLLM
  else
    venv=$root/.venv-vllm
    (ensure vllm-ci) || exit $unavailable
  fi
  cd "$root"
  JAX_PLATFORMS=cpu exec "$venv/bin/python" -m pytest -m vllm tests/serving "$@"
}

[ $# -gt 0 ] || {
  usage >&2
  exit 2
}
command=$1
base_extras=${BLOCKATTN_EXTRAS:-}
dev_extras=${base_extras:+$base_extras,}dev
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# Large pages for what XLA allocates anew in every step on a CPU: a quarter of a small model's step is page faults without.
[ "${command%-vllm}" = test ] || export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
case $command in
  -h | --help | help)
    usage
    ;;
  test)
    ensure "$dev_extras"
    shift
    run_tests "$@"
    ;;
  test-vllm)
    shift
    run_vllm_tests "$@"
    ;;
  lint)
    ensure "$dev_extras"
    cd "$root"
    exec "$venv/bin/python" -m ruff check .
    ;;
  types)
    ensure "$dev_extras"
    cd "$root"
    exec "$venv/bin/python" -m pyright --pythonpath "$venv/bin/python"
    ;;
  docs)
    ensure "$dev_extras"
    shift
    cd "$root"
    [ $# -gt 0 ] || set -- build --strict --quiet
    JAX_PLATFORMS=cpu exec "$venv/bin/python" -m mkdocs "$@"
    ;;
  demo)
    shift
    # What is fetched then has weights of 4 bits.
    [[ ! " $* " =~ " --model"[=\ ]"smollm2 " ]] || base_extras=${base_extras:+$base_extras,}gguf
    ensure "$base_extras"
    exec "$venv/bin/python" -m tools.demo "$@"
    ;;
  sweep)
    ensure "$base_extras"
    shift
    exec "$venv/bin/python" -m launch.sweep "$@"
    ;;
  --processes | --processes=* | --devices | --devices=*)
    ensure "$base_extras"
    exec "$venv/bin/python" -m launch.processes "$@"
    ;;
  *)
    ensure "$base_extras"
    exec "$venv/bin/python" "$@"
    ;;
esac
