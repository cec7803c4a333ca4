#!/usr/bin/env bash
# Write server/requirements/: the packages of the images, for Python 3.11 on x86-64, with the hashes of their files and
# the versions of constraints.txt. torch's CPU wheel must be in wheelhouse/cpu, or where pip is configured to look.
#
# torch has files of its own, because it is a layer of its own, and because its CPU and CUDA builds need other packages.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-lock
if [ ! -e "$venv/.done" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q -c constraints.txt uv
  touch "$venv/.done"
fi

lock() {
  local file="server/requirements/$1.txt"
  shift
  {
    echo "# Written by scripts/lock.sh."
    "$venv/bin/uv" pip compile -q --generate-hashes --no-header --no-annotate --python-version 3.11 \
      --python-platform x86_64-manylinux_2_28 --constraints constraints.txt "$@" -
  } >"$file.part"
  mv "$file.part" "$file"
}

mkdir -p server/requirements wheelhouse/cpu
if ! ls wheelhouse/cpu/torch-*+cpu-*.whl >/dev/null 2>&1; then
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.11 --constraint constraints.txt \
    --dest wheelhouse/cpu torch
fi
python3 scripts/requirements.py pyproject.toml | lock client
python3 scripts/requirements.py pyproject.toml server otel | grep -v '^torch' | lock server
echo "torch==$(sed -n 's/^torch==//p' constraints.txt)+cpu" | lock torch-cpu --find-links wheelhouse/cpu
echo torch | lock torch-cuda
echo hatchling | lock build
echo uv | lock uv
