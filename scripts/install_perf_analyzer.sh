#!/usr/bin/env bash
# Install Triton's perf_analyzer as .debs/perf_analyzer/run, for the tests marked conformance.
#
# It requires a newer C library than many machines have, so it runs with the loader and the libraries of Debian 13.
set -euo pipefail
cd "$(dirname "$0")/.."

version=2.60.0
folder=.debs/perf_analyzer
SUITE=trixie scripts/debian_packages.sh "$folder" libc6 libgcc-s1 libssl3t64 libstdc++6 libzstd1 zlib1g
version_file="$folder/.version"
if [ "$(cat "$version_file" 2>/dev/null)" = "$version" ]; then
  exit
fi
rm -rf "$folder/wheel"
python3 -m pip install -q --target "$folder/wheel" --no-deps --only-binary=:all: \
  --platform "manylinux_2_38_$(uname -m)" "perf-analyzer==$version"
chmod +x "$folder/wheel/perf_analyzer/bin/perf_analyzer"
cat >"$folder/run" <<'RUN'
#!/usr/bin/env bash
folder="$(dirname "$(realpath "$0")")"
libraries=("$folder"/usr/lib/*-linux-gnu)
loader=("$libraries"/ld-linux-*)
exec "$loader" --library-path "$libraries" "$folder/wheel/perf_analyzer/bin/perf_analyzer" "$@"
RUN
chmod +x "$folder/run"
echo "$version" >"$version_file"
