#!/usr/bin/env bash
# Unpack Debian packages into a folder: `debs.sh FOLDER PACKAGE...`; SUITE=trixie: of another suite than the machine's.
#
# They come from where the machine's apt looks, but nothing of the machine is changed, and nobody need be root.
set -euo pipefail
folder="$(realpath -m "$1")"
shift
if ! command -v apt-get >/dev/null; then
  echo "expected apt-get, for Debian's packages, got none: $* can't be fetched here" >&2
  exit 1
fi
# shellcheck source=/dev/null
own="$(. /etc/os-release && echo "$VERSION_CODENAME")"
suite="${SUITE:-$own}"
mark="$folder/.done"
if [ "$(cat "$mark" 2>/dev/null)" = "$suite $*" ]; then
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
(cd "$folder/debs" && "${apt[@]}" download "$@")
for each in "$folder"/debs/*.deb; do
  dpkg -x "$each" "$folder"
done
rm -r "$folder/apt" "$folder/debs"
echo "$suite $*" >"$mark"
