#!/usr/bin/env bash
# Exit with status 0 if a server takes calls, for a container's health check: it asks /readyz of --probes, which takes
# 2 ms of CPU time; `poolrpc health` takes a hundred times as much. It needs bash alone, which slim images have.
#   healthcheck.sh [HOST:PORT]     by default the address in POOLRPC_PROBES
set -eu
address=${1:-${POOLRPC_PROBES:?expected the address of --probes, host:port}}
host=${address%:*}
host=${host#[}
exec 3<>"/dev/tcp/${host%]}/${address##*:}"
printf 'GET /readyz HTTP/1.0\r\n\r\n' >&3
read -r -t 5 _ status _ <&3
[[ $status == 200 ]]
