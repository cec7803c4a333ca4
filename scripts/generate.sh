#!/usr/bin/env bash
# Generate client/poolrpc/v1 from protos/, with the oldest protobuf that users may have (major 6), in a venv of its own:
# code of protoc 6.31 runs under protobuf 6.31 and every later 6 and 7, and the server's health and reflection want 7.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-generate
if [ ! -x "$venv/bin/protoc-gen-mypy" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q 'grpcio-tools==1.75.1' 'protobuf==6.33.6' 'mypy-protobuf==5.1.0' 'setuptools<81'
fi
out=${1:-client}
mkdir -p "$out"
PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc \
  --proto_path=protos \
  --python_out="$out" --grpc_python_out="$out" \
  --mypy_out="$out" --mypy_grpc_out="$out" \
  protos/poolrpc/v1/*.proto
# A file without a service gets an empty grpc module; nobody imports it.
rm -f "$out"/poolrpc/v1/standard_pb2_grpc.py "$out"/poolrpc/v1/standard_pb2_grpc.pyi
