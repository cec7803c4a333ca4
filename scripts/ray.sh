#!/usr/bin/env bash
# Install the server with Ray, Ray Data too, and this checkout, for the tests marked ray and for docs/ray.md.
#
# They have an environment of their own, .venv-ray: Ray brings some sixty packages that nothing else here wants.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-ray
mark="$venv/.done"
wanted=$(cat scripts/ray.sh pyproject.toml constraints.txt | sha256sum)
if [ "$(cat "$mark" 2>/dev/null)" = "$wanted" ]; then
  exit
fi
python3 -m venv "$venv"
"$venv/bin/pip" install -q -c constraints.txt -e '.[ray,viz]' 'ray[data]'
echo "$wanted" >"$mark"
