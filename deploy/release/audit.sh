#!/usr/bin/env bash
# audit.sh PYTHON REQUIREMENTS: known vulnerabilities of the pinned packages. pip-audit is installed into an environment of
# its own, because nothing else needs it. Exit code 1: there are some.
set -euo pipefail

directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
"$1" -m venv "$directory"
"$directory/bin/pip" install --quiet --disable-pip-version-check 'pip-audit>=2.7,<3'
"$directory/bin/pip-audit" --no-deps --disable-pip --requirement "$2"
