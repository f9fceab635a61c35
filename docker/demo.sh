#!/usr/bin/env bash
# Sets up the demo federation of compose.demo.yaml: demo.sh HUB HOST PORT SITES makes a hub in the folder HUB that sites
# reach at HOST:PORT, three hospitals in SITES/alder, SITES/birch and SITES/cedar, and their approval of HUB/study.yaml.
set -euo pipefail
hub=$1 host=$2 port=$3 sites=$4

if [ -e "$hub/hub.yaml" ]; then
    echo "the demo is set up already"
    exit
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m gapweave.sites.demo --out "$work/demo" --hospitals 3
gapweave server init --dir "$hub" --name demo --host "$host" --port "$port"
# Two rounds instead of the demo's twenty.
sed 's/rounds: 20/rounds: 2/' "$work/demo/study.yaml" > "$hub/study.yaml"
for name in alder birch cedar; do
    site=$sites/$name
    mkdir -p "$site"
    cp -r "$work/demo/data/$name" "$site/data"
    cp "$hub/connection.yaml" "$hub/study.yaml" "$site"
    # `init` makes the key pair; the demo has a site file of its own.
    gapweave site init "$site/site.yaml" --connection "$site/connection.yaml"
    sed "s#\.\./data/$name#data#; s#\.\./state/$name#state#" "$work/demo/sites/$name.yaml" > "$site/site.yaml"
    echo 'server: {connection: connection.yaml, key: site.key}' >> "$site/site.yaml"
    gapweave server add-site "$name" --key "$site/site.pub" --dir "$hub"
    gapweave site approve "$site/site.yaml" --study "$site/study.yaml"
done
