#!/usr/bin/env bash
# Download Debian packages and unpack them into a folder: `debian_packages.sh FOLDER PACKAGE...`
#
# DEPENDENCIES=1 takes what they depend on too, as far as the machine does not have it.
# SUITE=trixie takes the packages of that release of Debian instead of the machine's own. They come from the mirror that
# the machine's apt is configured for. Nothing is installed on the machine, and no root access is needed.
set -euo pipefail
folder="$(realpath -m "$1")"
shift
if ! command -v apt-get >/dev/null; then
  echo "expected apt-get, to download Debian packages, got none: $* can't be fetched here" >&2
  exit 1
fi
# shellcheck source=/dev/null
own="$(. /etc/os-release && echo "$VERSION_CODENAME")"
suite="${SUITE:-$own}"
mkdir -p "$(dirname "$folder")"
exec 9>"$folder.lock"
flock 9  # tests in several processes call this at the same time
done_file="$folder/.done"
wanted="$suite $*"
if [ "$(cat "$done_file" 2>/dev/null)" = "$wanted" ]; then
  exit
fi
rm -rf "$folder"
mkdir -p "$folder/apt/lists/partial" "$folder/apt/cache/archives/partial" "$folder/debs"
uri="$(apt-get --print-uris update | sed -n "s|^'\(.*\)/dists/$own/InRelease'.*|\1|p" | head -n1)"
if [ -z "$uri" ]; then
  echo "expected a source of $own in apt's list, got none: $* can't be fetched here" >&2
  exit 1
fi
echo "deb $uri $suite main" >"$folder/apt/sources.list"
apt=(
  apt-get -qq
  -o "Dir::Etc::sourcelist=$folder/apt/sources.list" -o Dir::Etc::sourceparts=-
  -o "Dir::State::lists=$folder/apt/lists" -o "Dir::Cache=$folder/apt/cache"
  -o "APT::Sandbox::User=$(id -un)" -o APT::Update::Error-Mode=any -o Acquire::Retries=3
)
"${apt[@]}" update
if [ -n "${DEPENDENCIES:-}" ]; then
  # shellcheck disable=SC2046 # several words
  set -- $("${apt[@]}" --simulate install --no-install-recommends "$@" | sed -n 's/^Inst \([^ ]*\) .*/\1/p')
fi
(cd "$folder/debs" && "${apt[@]}" download "$@")
for package in "$folder"/debs/*.deb; do
  dpkg -x "$package" "$folder"
done
rm -r "$folder/apt" "$folder/debs"
echo "$wanted" >"$done_file"
