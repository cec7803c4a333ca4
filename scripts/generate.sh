#!/usr/bin/env bash
# Generate client/poolrpc/v1 and server/poolrpc_server/protocols/triton/generated from protos/; with --check, only tell whether that would
# change anything.
#
# The code is made with the oldest protobuf that users may have (major 6), in a venv of its own: what protoc 6.31 writes
# runs under protobuf 6.31 and every later 6 and 7, while the server's health and reflection want 7 here.
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
  # A file without a service gets an empty grpc module; nobody imports it.
  rm -f "$1"/client/poolrpc/v1/standard_pb2_grpc.py "$1"/client/poolrpc/v1/standard_pb2_grpc.pyi
  # The server alone speaks this one, and needs no stubs; a file that imports no other may lie anywhere.
  protoc --proto_path=protos/inference --python_out="$1/$triton" --mypy_out="quiet:$1/$triton" open_inference.proto
}

if [ "${1:-}" = --check ]; then
  fresh=$(mktemp -d)
  trap 'rm -rf "$fresh"' EXIT
  generate "$fresh"
  for made in client/poolrpc/v1 "$triton"; do
    diff -r --exclude=__pycache__ "$fresh/$made" "$made" || {
      echo "$made is out of step with protos/: run make generate" >&2
      exit 1
    }
  done
else
  generate .
fi
