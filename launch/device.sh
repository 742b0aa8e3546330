#!/usr/bin/env bash
# Runs Python in this checkout on a machine that has no network, with what it lacks taken from a folder of wheels.
#
#   launch/device.sh pack WHEELS [PACKAGE ...]   where there is a network: downloads wheels for Python 3.12 on Linux, x86-64
#   launch/device.sh WHEELS ARGS                 there: installs the wheels below WHEELS, then runs python3 ARGS
#
# The machine has to have Python 3.12, jax, flax, optax, orbax-checkpoint and transformers; `pack` without packages takes what
# else tools.device needs. PYTHON names another Python.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${PYTHON:-python3}
needed=(grain==0.2.18 array-record==0.8.6 ml-collections==1.1.0 tensorboardX==2.6.5 gguf==0.19.0 cloudpickle portpicker)
peers=(tokamax==0.0.17 einshape qwix==0.1.8 immutabledict pydantic==2.14.4 pydantic-core==2.50.5 annotated-types
  typing-inspection xprof==2.24.2 fire termcolor)   # a peer of the kernels, and all that it imports; left out if too large

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

case ${1:-} in
  '' | -h | --help)
    usage
    [ $# -gt 0 ] && exit 0 || exit 2
    ;;
  pack)
    [ $# -ge 2 ] || { usage >&2; exit 2; }
    wheels=$2
    shift 2
    [ $# -gt 0 ] || set -- "${needed[@]}" "${peers[@]}"
    platforms=()
    for version in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${version}_x86_64"); done
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
      "${platforms[@]}" --platform manylinux2014_x86_64 -d "$wheels" "$@"
    du -ch "$wheels"/*.whl
    ;;
  *)
    wheels=$1
    shift
    ls "$wheels"/*.whl >/dev/null 2>&1 || { echo "device.sh: no wheels in $wheels; make them with: $0 pack $wheels" >&2; exit 2; }
    wheels=$(cd "$wheels" && pwd -P)
    if ! [ -e "$wheels/site/complete" ]; then
      rm -rf "$wheels/site"
      "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$wheels/site" "$wheels"/*.whl
      touch "$wheels/site/complete"
    fi
    export PYTHONPATH="$root:$wheels/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    cd "$root"
    exec "$python" "$@"
    ;;
esac
