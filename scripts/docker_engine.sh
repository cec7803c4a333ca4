#!/usr/bin/env bash
# Start a Docker engine for the tests, if none is running and the machine has a script that can start one:
#   eval "$(scripts/docker_engine.sh start)"   sets the variables that reach the engine
#   scripts/docker_engine.sh stop              stops the engine that `start` started
# `start` prints nothing if an engine is running already, or if there is no script. POOLRPC_ENGINE is the path of the
# script; its commands are install, start, base, env and stop.
set -euo pipefail
cd "$(dirname "$0")/.."

engine=${POOLRPC_ENGINE:-../shared/containers/engine.sh}
case ${1:?usage: docker_engine.sh start|stop} in
start)
  if docker info >/dev/null 2>&1 || ! [ -x "$engine" ]; then exit 0; fi
  # Such a machine can't pull the genuine base image, so the script builds a replacement of the same name.
  { "$engine" install && "$engine" start && "$engine" base python:3.11-slim-bookworm; } >&2
  "$engine" env
  echo 'export DOCKER_ENGINE_STARTED=1'
  ;;
stop)
  if [ -n "${DOCKER_ENGINE_STARTED:-}" ]; then "$engine" stop; fi
  ;;
esac
