#!/usr/bin/env bash
# install.sh ENVIRONMENT REQUIREMENTS: make the virtual environment if there is none, install the pins, then this package.
set -euo pipefail

environment=$1
requirements=$2

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

install_venv_package() {
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || return 1
        as_root=(sudo -n)
    fi
    command -v apt-get >/dev/null || return 1
    echo "python3-venv is missing; installing it with apt-get ..." >&2
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq || true
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq --yes --no-install-recommends python3-venv ca-certificates >/dev/null
}

python=$("$BASH" "${0%/*}/find-python.sh")
if ! "$environment/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    rm -rf "$environment"
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        install_venv_package || fail \
            "This Python cannot make a virtual environment: on Debian, install the package python3-venv:" \
            "    sudo apt-get install python3-venv"
    fi
    echo "making $environment with $("$python" --version) ..." >&2
    "$python" -m venv "$environment"
fi

# The pins are complete, so nothing needs to be resolved: pip spent a minute of CPU on that. `pip check` says whether they are.
install_with_uv() {
    [ "${UV:-uv}" != pip ] && command -v "${UV:-uv}" >/dev/null || return 1
    "${UV:-uv}" pip install --quiet --python "$environment/bin/python" --no-deps "$@" ||
        { echo "uv could not install them; trying pip ..." >&2; return 1; }
}

pip() {
    "$environment/bin/python" -m pip --quiet --disable-pip-version-check "$@"
}

install_pins() {
    install_with_uv "$@" || pip install --no-deps "$@"
}

echo "installing $requirements ..." >&2
hashed=${requirements%.txt}.hashed.txt
if ! { [ -f "$hashed" ] && install_pins --require-hashes --requirement "$hashed"; }; then
    [ ! -f "$hashed" ] || echo "the index serves other files than those of $hashed: installing without hashes" >&2
    install_pins --requirement "$requirements"
fi
pip install --no-deps --editable .
pip check >&2 || fail "The pins in $requirements do not agree with pyproject.toml or with each other: make lock"
