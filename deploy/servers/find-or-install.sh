#!/usr/bin/env bash
# Find redis-server and rabbitmq-server, or install their Debian packages without starting any service.
# The tests start private instances of their own. Exit code 1 when a server is missing and cannot be installed.
set -euo pipefail

PATH="$PATH:${SERVER_DIRECTORIES:-/usr/local/sbin:/usr/sbin:/sbin:/usr/lib/rabbitmq/bin}"
declare -A package_of=([redis-server]=redis-server [rabbitmq-server]=rabbitmq-server)

missing_packages() {
    local server
    for server in redis-server rabbitmq-server; do
        command -v "$server" >/dev/null || echo "${package_of[$server]}"
    done
}

mapfile -t packages < <(missing_packages)
if [ "${#packages[@]}" = 0 ]; then
    exit 0
fi

explain() {
    printf '%s\n' \
        "The tests need: ${packages[*]} (Debian packages), and $1." \
        "Install them with:  sudo apt-get install --no-install-recommends ${packages[*]}" >&2
    exit 1
}

command -v apt-get >/dev/null || explain "this machine has no apt-get to install them with"
as_root=()
if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || explain "installing them needs root (or sudo without a password)"
    as_root=(sudo -n)
fi

# Debian starts a server as soon as it is installed, unless this file says 101 (action forbidden by policy).
policy=/usr/sbin/policy-rc.d
restore_policy() {
    if [ -n "${wrote_policy:-}" ]; then
        "${as_root[@]}" rm -f "$policy"
    fi
}
trap restore_policy EXIT
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    wrote_policy=yes
    "${as_root[@]}" chmod 755 "$policy"
fi

install_packages() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
        apt-get install -qq --yes --no-install-recommends "${packages[@]}" >/dev/null
}

echo "installing ${packages[*]} (services are not started) ..." >&2
if ! install_packages 2>/dev/null; then
    "${as_root[@]}" apt-get update -qq
    install_packages || explain "apt-get could not install them"
fi
mapfile -t packages < <(missing_packages)
[ "${#packages[@]}" = 0 ] || explain "they are not where they were expected after the installation"
