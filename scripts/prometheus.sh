#!/usr/bin/env bash
# Have Debian's prometheus and promtool in .debs/prometheus/usr/bin, for tests/deploy. No service is installed or started.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/debs.sh .debs/prometheus prometheus
