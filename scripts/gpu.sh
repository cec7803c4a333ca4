#!/usr/bin/env bash
# Run the tests marked gpu and `python -m benchmarks gpu` on a machine that has a GPU and perhaps no network:
#   scripts/gpu.sh [FOLDER]      # leaves gpu.json and gpu.log in FOLDER [default: gpu-results]
# It uses the machine's python3 (PYTHON=... for another) with its torch, grpcio, protobuf and NumPy. What else is needed
# is installed from gpu-wheels/, which `make gpu-wheels` fills on a machine with a network, into a temporary folder.
# The exit status is that of the first step that failed; 3 if there is no CUDA device.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
results=$(mkdir -p "${1:-gpu-results}" && cd "${1:-gpu-results}" && pwd)
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
exec > >(tee "$results/gpu.log") 2>&1

if compgen -G "gpu-wheels/*.whl" >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$packages" gpu-wheels/*.whl ||
    exit
fi
export PYTHONPATH="$packages:client:server" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

"$python" - <<'PYTHON' || exit
import platform
import grpc, numpy, torch
card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
print(f"Python {platform.python_version()}, torch {torch.__version__}, grpcio {grpc.__version__}, "
      f"NumPy {numpy.__version__}, {card}", flush=True)
PYTHON

status=0
# Each step has a limit, so that all of it takes less than six minutes.
timeout 180 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/gpu || status=$?
timeout 150 "$python" -m benchmarks gpu --json "$results/gpu.json" || { failed=$?; [ "$status" -ne 0 ] || status=$failed; }
exit "$status"
