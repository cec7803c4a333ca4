#!/usr/bin/env bash
# Run the tests with Debian's own Python, torch and NumPy, in a chroot made from Debian's packages:
#   scripts/debian_suite.sh [PYTEST ARGUMENT...]
# They are those of Debian 13: Python 3.13 and torch 2.6. SUITE=forky takes those of Debian's next release: Python 3.14.
# It needs root, mmdebstrap and a package registry. The chroot is .debian-SUITE (CHROOT=... for another folder); it is
# kept, and a later run only replaces the tree in it, and the packages if they changed. Left out are the tests that need
# containers, Ray, programs of other projects, a browser, a GPU, or a package registry: pip does not accept Debian's sympy
# for Debian's torch.
set -euo pipefail
cd "$(dirname "$0")/.."

suite=${SUITE:-trixie}
root=$(realpath -m "${CHROOT:-.debian-$suite}")
if [ "$(id -u)" -ne 0 ] || ! command -v mmdebstrap >/dev/null; then
  echo "expected to run as root, with mmdebstrap installed, got $(id -un), $(command -v mmdebstrap || echo no mmdebstrap)" >&2
  exit 1
fi

# The mounts end with the command.
inside() {
  # shellcheck disable=SC2016 # the inner shell expands these
  unshare --mount bash -c '
    root=$1; shift
    for each in dev proc sys; do mount --rbind "/$each" "$root/$each"; done
    exec chroot "$root" /usr/bin/env -i HOME=/root LANG=C.UTF-8 PATH=/venv/bin:/usr/bin:/bin bash -c "cd /work && exec \"\$@\"" - "$@"
  ' - "$root" "$@"
}

if [ ! -e "$root/.done" ]; then
  rm -rf "$root"
  # The mirror may be a snapshot, whose lists have expired; their signatures are checked in any case.
  mmdebstrap --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' "$suite" "$root" \
    --include=ca-certificates,git,make,procps,python3,python3-pip,python3-setuptools,python3-torch,python3-venv
  touch "$root/.done"
fi

# What the tests need besides Debian's torch and NumPy, downloaded here: the chroot needs no network.
stamp=$(cat pyproject.toml constraints.txt | sha256sum)
if [ "$(cat "$root/.packages" 2>/dev/null)" != "$stamp" ]; then
  mkdir -p "$root/wheels" "$root/work"
  venv=.venv-lock
  if [ ! -e "$venv/.done" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q -c constraints.txt uv
    touch "$venv/.done"
  fi
  version=$(inside python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  printf '%s; python_version < "0"\n' torch numpy >"$root/wheels/overrides.txt"
  "$venv/bin/uv" pip compile -q --no-header --no-annotate --python-version "$version" --constraints constraints.txt \
    --overrides "$root/wheels/overrides.txt" --extra server --extra viz --extra progress --extra bfloat16 --extra onnx \
    --extra otel --group test --group build --output-file "$root/wheels/requirements.txt" pyproject.toml
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --dest "$root/wheels" \
    --requirement "$root/wheels/requirements.txt"
  inside python3 -m venv --system-site-packages /venv
  inside pip install -q --no-index --no-deps --find-links /wheels --requirement /wheels/requirements.txt
  echo "$stamp" >"$root/.packages"
fi

rm -rf "$root/work"
mkdir "$root/work"
git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from=- | tar --extract --directory="$root/work"
inside git init -q .
inside git add --all
inside pip install -q --no-index --no-deps --no-build-isolation --editable .
inside python -c 'import platform, numpy, torch; print("Python", platform.python_version(), "torch", torch.__version__, "NumPy", numpy.__version__)'
# Deselected, not ignored: pytest collects the testpaths of pyproject.toml, such as README.md, in any case.
inside python -m pytest -q -p no:cacheprovider -m "not (docker or ray or conformance or browser or gpu)" \
  --deselect=README.md --deselect=docs/explorer.md --deselect=docs/index.md --deselect=docs/tracing.md \
  --deselect=tests/deploy/test_chart.py \
  --deselect=tests/packaging/test_wheel.py --deselect=tests/unit/benchmarks/test_gpu.py::test_the_script_needs_only "$@"
