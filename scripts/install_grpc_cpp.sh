#!/usr/bin/env bash
# Download Debian's gRPC for C++, with protoc and pkg-config's files, to .debs/grpc, for the blocks of docs/languages.md.
set -euo pipefail
cd "$(dirname "$0")/.."
SUITE=bookworm scripts/debian_packages.sh .debs/grpc libgrpc++-dev libgrpc-dev libgrpc++1.51 libgrpc29 \
  libprotobuf-dev libprotobuf32 libprotoc32 protobuf-compiler protobuf-compiler-grpc libabsl-dev libabsl20220623 \
  libc-ares-dev libc-ares2 libre2-dev libre2-9 libssl-dev libssl3 zlib1g-dev zlib1g
