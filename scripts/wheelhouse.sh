#!/usr/bin/env bash
# Fill wheelhouse/ with the packages of server/requirements/, so that the images can be built without a registry:
#   scripts/wheelhouse.sh [cpu|cuda]
#   docker build --build-arg PIP_NO_INDEX=1 ...
# torch comes from wherever pip is configured to look: PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS or pip's configuration files.
# Each variant of torch has a folder of its own, because pip can't distinguish a CPU wheel from a CUDA wheel.
set -euo pipefail
cd "$(dirname "$0")/.."

variant=${1:-cpu}
python=${PYTHON:-python3}
mkdir -p "wheelhouse/$variant"
for name in build client server "torch-$variant"; do
  # Files that pip finds in the folder are not downloaded again.
  "$python" -m pip download -q --dest wheelhouse --require-hashes --no-deps \
    --only-binary=:all: --python-version 3.11 --find-links wheelhouse --find-links "wheelhouse/$variant" \
    --requirement "server/requirements/$name.txt"
done
mv wheelhouse/torch-*.whl "wheelhouse/$variant/"
