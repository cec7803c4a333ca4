#!/usr/bin/env bash
# Run the tests marked gpu and `python -m benchmarks gpu` on a machine that has a GPU and perhaps no network:
#   scripts/gpu.sh [FOLDER]      # leaves gpu.json and gpu.log in FOLDER [default: gpu-results]
# It uses the machine's python3 (PYTHON=... for another) with its torch, grpcio, protobuf and NumPy. What else is needed
# is installed from gpu-wheels/, which `make gpu-wheels` fills on a machine with a network, into a temporary folder.
# The exit status is that of the first step that failed; without a CUDA device the tests are skipped, and it is 3.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
results=$(mkdir -p "${1:-gpu-results}" && cd "${1:-gpu-results}" && pwd)
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
exec > >(tee "$results/gpu.log") 2>&1

first="" status=0
step() {  # NAME SECONDS COMMAND...: the limits of all steps together are less than six minutes
  local name=$1 seconds=$2 code=0
  shift 2
  timeout --signal=INT --kill-after=5 "$seconds" "$@" || code=$?
  if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
    first=$name status=$code
  fi
  return "$code"
}
end() {
  [ "$status" -eq 0 ] || echo "gpu.sh: the $first failed first, with the exit status $status"
  exit "$status"
}

if compgen -G "gpu-wheels/*.whl" >/dev/null; then
  step "installation of gpu-wheels/" 40 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
    --root-user-action=ignore --target "$packages" gpu-wheels/*.whl || end
fi
export PYTHONPATH="$packages:client:server" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

step "import of grpcio, NumPy and torch" 30 "$python" -c '
import platform
import grpc, numpy, torch
card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
print(f"Python {platform.python_version()}, torch {torch.__version__}, grpcio {grpc.__version__}, "
      f"NumPy {numpy.__version__}, {card}", flush=True)' || end
# Without the root conftest.py, which makes tests of the docs, and needs more packages.
step "tests" 145 "$python" -m pytest -q -p no:cacheprovider --confcutdir=tests -m gpu tests/gpu
step "benchmark" 125 "$python" -m benchmarks gpu --json "$results/gpu.json"
end
