#!/usr/bin/env bash
# find-or-install.sh [PROGRAM…]: find programs (redis-server and rabbitmq-server), or install the Debian packages of the
# same names without starting any service. The tests start private instances of their own. Exit code 1 when a program is
# missing and cannot be installed.
set -euo pipefail

if [ "$#" = 0 ]; then
    set -- redis-server rabbitmq-server
fi

PATH="$PATH:${SERVER_DIRECTORIES:-/usr/local/sbin:/usr/sbin:/sbin:/usr/lib/rabbitmq/bin}"

missing_packages() {
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

mapfile -t packages < <(missing_packages "$@")
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
mapfile -t packages < <(missing_packages "$@")
[ "${#packages[@]}" = 0 ] || explain "they are not where they were expected after the installation"
