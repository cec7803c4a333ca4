#!/usr/bin/env bash
# Download Debian's prometheus and promtool to .debs/prometheus/usr/bin, for tests/deploy. No service is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/debian_packages.sh .debs/prometheus prometheus
