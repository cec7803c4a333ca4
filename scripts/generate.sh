#!/usr/bin/env bash
# Generate client/poolrpc/v1 from protos/; with --check, only tell whether that would change anything.
#
# The code is made with the oldest protobuf that users may have (major 6), in a venv of its own: what protoc 6.31 writes
# runs under protobuf 6.31 and every later 6 and 7, while the server's health and reflection want 7 here.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-generate
if [ ! -e "$venv/.done" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q 'grpcio-tools==1.75.1' 'protobuf==6.33.6' 'mypy-protobuf==5.1.0' 'setuptools<81'
  touch "$venv/.done"
fi

generate() {
  PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc \
    --proto_path=protos \
    --python_out="$1" --grpc_python_out="$1" --mypy_out="quiet:$1" --mypy_grpc_out="quiet:$1" \
    protos/poolrpc/v1/*.proto
  # A file without a service gets an empty grpc module; nobody imports it.
  rm -f "$1"/poolrpc/v1/standard_pb2_grpc.py "$1"/poolrpc/v1/standard_pb2_grpc.pyi
}

if [ "${1:-}" = --check ]; then
  fresh=$(mktemp -d)
  trap 'rm -rf "$fresh"' EXIT
  generate "$fresh"
  diff -r --exclude=__pycache__ "$fresh/poolrpc/v1" client/poolrpc/v1 || {
    echo "client/poolrpc/v1 is out of step with protos/: run make generate" >&2
    exit 1
  }
else
  generate client
fi
