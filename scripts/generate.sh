#!/usr/bin/env bash
# Generate client/poolrpc/v1 and server/poolrpc_server/protocols/triton/generated from protos/. With --check: fail if the
# committed code differs from what would be generated.
#
# The code is generated with the oldest protobuf that users may have (major version 6), in a virtual environment of its
# own: the output of protoc 6.31 runs under protobuf 6.31 and every later 6 and 7, while the development environment has
# protobuf 7, because gRPC's health and reflection packages require it.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-generate
triton=server/poolrpc_server/protocols/triton/generated
if [ ! -e "$venv/.done" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q 'grpcio-tools==1.75.1' 'protobuf==6.33.6' 'mypy-protobuf==5.1.0' 'setuptools<81'
  touch "$venv/.done"
fi

protoc() {
  PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc --proto_path=protos "$@"
}

generate() {
  mkdir -p "$1/client" "$1/$triton"
  protoc --python_out="$1/client" --grpc_python_out="$1/client" --mypy_out="quiet:$1/client" \
    --mypy_grpc_out="quiet:$1/client" protos/poolrpc/v1/*.proto
  # protoc writes an empty grpc module for a file without a service; it is never imported.
  rm -f "$1"/client/poolrpc/v1/standard_pb2_grpc.py "$1"/client/poolrpc/v1/standard_pb2_grpc.pyi
  # Only the server uses this protocol, and it needs no stubs. The file imports no other, so it may be in any package.
  protoc --proto_path=protos/inference --python_out="$1/$triton" --mypy_out="quiet:$1/$triton" open_inference.proto
}

if [ "${1:-}" = --check ]; then
  fresh=$(mktemp -d)
  trap 'rm -rf "$fresh"' EXIT
  generate "$fresh"
  for folder in client/poolrpc/v1 "$triton"; do
    diff -r --exclude=__pycache__ "$fresh/$folder" "$folder" || {
      echo "$folder differs from what protos/ generates: run make generate" >&2
      exit 1
    }
  done
else
  generate .
fi
