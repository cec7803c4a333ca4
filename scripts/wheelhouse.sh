#!/usr/bin/env bash
# Fill wheelhouse/ with every package that the images install, so that they can be built without a registry:
#   scripts/wheelhouse.sh [cpu|cuda]
#   docker build --build-arg PIP_NO_INDEX=1 ...
# torch comes from wherever pip is configured to look: PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS or pip's configuration files.
# Each variant of torch has a folder of its own, because pip can't distinguish a CPU wheel from a CUDA wheel.
set -euo pipefail
cd "$(dirname "$0")/.."

variant=${1:-cpu}
python=${PYTHON:-python3}
mkdir -p "wheelhouse/$variant"
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$python" scripts/requirements.py pyproject.toml server otel >"$requirements"
"$python" -m pip download -q --dest wheelhouse --find-links "wheelhouse/$variant" --constraint constraints.txt \
  --only-binary=:all: --python-version 3.11 --requirement "$requirements" hatchling
mv wheelhouse/torch-*.whl "wheelhouse/$variant/"
