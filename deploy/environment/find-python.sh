#!/usr/bin/env bash
# find-python.sh: print the Python that the virtual environment is made of. PYTHON names another one.
set -euo pipefail

system=${SYSTEM_PYTHON:-/usr/bin/python3}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Compiled without profile-guided optimisation, as plain ./configure does: everything takes half as long again.
# Distributions use it, but Debian's Python does not tell.
is_unoptimised() {
    "$1" -c '
import sys, sysconfig
told = sysconfig.get_config_var("CONFIG_ARGS") or ""
sys.exit(sys.base_prefix == "/usr" or "--enable-optimizations" in told)' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    printf '%s\n' \
        "Python 3.11 or newer is needed, and none was found (looked for python3, python3.14, python3.13, python3.12, python3.11)." \
        "On Debian 12 or newer: apt-get install python3 python3-venv. Or name one: make PYTHON=/path/to/python3.12 ..." >&2
    return 1
}

python=$(find_python)
if [ -z "${PYTHON:-}" ] && is_unoptimised "$python" && is_new_enough "$system" && "$system" -c 'import ensurepip' 2>/dev/null; then
    echo "$python was compiled without --enable-optimizations: taking $system (PYTHON=$python takes it all the same)" >&2
    python=$system
fi
echo "$python"
