#!/usr/bin/env bash
# make-passwords.sh EXAMPLE TARGET: copy EXAMPLE to TARGET (readable by its owner alone), each empty password filled at random.
set -euo pipefail

example=$1
target=$2
if [ -e "$target" ]; then
    touch "$target" # newer than its example from now on: passwords in use are never replaced
    exit 0
fi

umask 077
draft=$(mktemp "$target.XXXXXX")
trap 'rm -f "$draft"' EXIT
while IFS= read -r line; do
    if [[ $line =~ ^[A-Z_]+_PASSWORD=$ ]]; then
        line+=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
    fi
    printf '%s\n' "$line"
done <"$example" >"$draft"
mv "$draft" "$target"
echo "wrote $target with new passwords" >&2
