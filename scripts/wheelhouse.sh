#!/usr/bin/env bash
# Fill wheelhouse/ with all that the images install, so that they are built without a registry:
#   scripts/wheelhouse.sh [cpu|cuda]
#   docker build --build-arg PIP_NO_INDEX=1 ...
# torch comes from where pip is told to look: PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS or pip's own configuration. It lies in
# a folder of its own for each kind, since a CPU's wheel would otherwise be taken for CUDA's.
set -euo pipefail
cd "$(dirname "$0")/.."

kind=${1:-cpu}
python=${PYTHON:-python3}
mkdir -p "wheelhouse/$kind"
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$python" scripts/requirements.py pyproject.toml server otel >"$requirements"
"$python" -m pip download -q --dest wheelhouse --find-links "wheelhouse/$kind" --constraint constraints.txt \
  --only-binary=:all: --python-version 3.11 --requirement "$requirements" hatchling
mv wheelhouse/torch-*.whl "wheelhouse/$kind/"
