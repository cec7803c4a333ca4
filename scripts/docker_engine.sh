#!/usr/bin/env bash
# A Docker engine for the tests, where none answers and the machine has a way to start one:
#   eval "$(scripts/docker_engine.sh start)"   says how to reach it; nothing where there is none, or one runs already
#   scripts/docker_engine.sh stop              stops it, if it is the one that was started
# POOLRPC_ENGINE names a script with the verbs install, start, base, env and stop.
set -euo pipefail
cd "$(dirname "$0")/.."

engine=${POOLRPC_ENGINE:-../shared/containers/engine.sh}
case ${1:?usage: docker_engine.sh start|stop} in
start)
  if docker info >/dev/null 2>&1 || ! [ -x "$engine" ]; then exit 0; fi
  # The genuine base can't be pulled where this is needed: its stand-in takes its name.
  { "$engine" install && "$engine" start && "$engine" base python:3.11-slim-bookworm; } >&2
  "$engine" env
  echo 'export POOLRPC_ENGINE_STARTED=1'
  ;;
stop)
  if [ -n "${POOLRPC_ENGINE_STARTED:-}" ]; then "$engine" stop; fi
  ;;
esac
