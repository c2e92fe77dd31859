# Sourced by the other scripts, from the root of the project, with the extra to install, or "": `source launch/setup.sh ""`.
# (Without an argument it would see the script's own ones.)
# Makes .venv with the pinned dependencies and activates it; does nothing where that is done. PYTHON names another Python.
extra=$1
setup_stamp=".venv/.installed${extra:+-$extra}"
setup_want=$(cat pyproject.toml constraints.txt | cksum)

if [ "$(cat "$setup_stamp" 2>/dev/null)" != "$setup_want" ]; then
    python=""
    for candidate in ${PYTHON:-} python3.13 python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "gandist needs Python 3.11 or newer; install it, or name it: PYTHON=/path/to/python3 bash $0" >&2
        exit 2
    fi
    echo "setting up .venv with $("$python" --version) (once; a few minutes where the network is slow)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
    echo "$setup_want" > "$setup_stamp"
fi
# shellcheck disable=SC1091
source .venv/bin/activate
