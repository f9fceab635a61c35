#!/usr/bin/env bash
# Makes docs/privacy-report.png again: three studies on one state folder, and what headless Chromium shows of the report.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

study() { gapweave simulate --out "$folder/$1" --state "$folder/hospitals" --rounds 6 --set "name=$1" "${@:2}" > "$folder/log"; }
study first --set epsilon=3
study heads-only --set epsilon=2 --set sharing.policy=heads
study small --set epsilon=0.5 --seed 1

gapweave privacy report "$folder/hospitals/alder" --out "$folder/alder.html"
chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
  --disable-component-update --disable-sync --hide-scrollbars --user-data-dir="$folder/profile" \
  --window-size=1280,800 --screenshot="$here/privacy-report.png" "file://$folder/alder.html" 2> "$folder/log"
