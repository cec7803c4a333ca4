#!/usr/bin/env bash
# Install this checkout with Ray Serve and Ray Data into .venv-ray, for the tests marked ray and for docs/ray.md.
#
# The virtual environment is a separate one, because Ray installs about sixty packages that nothing else here uses.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-ray
done_file="$venv/.done"
inputs=$(cat scripts/install_ray.sh pyproject.toml constraints.txt | sha256sum)
if [ "$(cat "$done_file" 2>/dev/null)" = "$inputs" ]; then
  exit
fi
python3 -m venv "$venv"
"$venv/bin/pip" install -q -c constraints.txt -e '.[ray,viz]' 'ray[data]'
echo "$inputs" >"$done_file"
