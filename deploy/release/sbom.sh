#!/usr/bin/env bash
# sbom.sh PYTHON DIRECTORY: a software bill of materials of the pinned runtime packages, CycloneDX in JSON. cyclonedx-bom is
# installed into an environment of its own, because nothing else needs it.
set -euo pipefail

python=$1
directory=$2
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
mkdir -p "$directory"
"$python" -m venv "$directory/.sbom"
"$directory/.sbom/bin/pip" install --quiet --disable-pip-version-check 'cyclonedx-bom>=7,<8'
"$directory/.sbom/bin/cyclonedx-py" requirements --pyproject pyproject.toml --output-reproducible \
    --output-file "$directory/distributor-node-$version.cdx.json" requirements/runtime.txt
rm -rf "$directory/.sbom"
echo "$directory/distributor-node-$version.cdx.json"
