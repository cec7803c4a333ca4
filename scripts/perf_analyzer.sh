#!/usr/bin/env bash
# Have Triton's perf_analyzer in .debs/perf_analyzer/run, for the tests marked conformance.
#
# It wants a newer C library than many machines have, so it runs by the loader, and with the libraries, of Debian 13.
set -euo pipefail
cd "$(dirname "$0")/.."

version=2.60.0
folder=.debs/perf_analyzer
SUITE=trixie scripts/debs.sh "$folder" libc6 libgcc-s1 libssl3t64 libstdc++6 libzstd1 zlib1g
mark="$folder/.version"
if [ "$(cat "$mark" 2>/dev/null)" = "$version" ]; then
  exit
fi
rm -rf "$folder/wheel"
python3 -m pip install -q --target "$folder/wheel" --no-deps --only-binary=:all: \
  --platform "manylinux_2_38_$(uname -m)" "perf-analyzer==$version"
chmod +x "$folder/wheel/perf_analyzer/bin/perf_analyzer"
cat >"$folder/run" <<'RUN'
#!/usr/bin/env bash
here="$(dirname "$(realpath "$0")")"
libraries=("$here"/usr/lib/*-linux-gnu)
loader=("$libraries"/ld-linux-*)
exec "$loader" --library-path "$libraries" "$here/wheel/perf_analyzer/bin/perf_analyzer" "$@"
RUN
chmod +x "$folder/run"
echo "$version" >"$mark"
