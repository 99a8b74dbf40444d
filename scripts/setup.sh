#!/bin/sh
# Make a virtual environment at $1 with the newest suitable Python; quick when it already stands.
set -eu
venv=$1

suits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

if suits "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi
for candidate in ${PYTHON:-} python3.13 python3.12 python3.11 python3; do
    if suits "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "${python:-}" ]; then
    echo "Headrace needs Python 3.11 or newer; none of python3.13, python3.12, python3.11, python3 is." >&2
    echo "Install one (Debian: apt-get install python3 python3-venv; macOS: brew install python) or set PYTHON=…" >&2
    exit 1
fi
echo "Making $venv with $("$python" --version)"
rm -rf "$venv"
# Debian keeps ensurepip in a package of its own; its pip can still fill an environment from outside.
if ! "$python" -m venv "$venv" >/dev/null 2>&1; then
    rm -rf "$venv"
    "$python" -m venv --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install --quiet pip
fi
