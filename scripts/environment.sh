# Sourced by the scripts beside it: make or reuse a virtual environment and activate it.
# FISHERTOOL_VENV names another folder than .venv.
venv="${FISHERTOOL_VENV:-$PWD/.venv}"
if [ ! -x "$venv/bin/python" ]; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "fishertool needs Python 3.11 or newer; this is $(python3 --version)" >&2
    exit 1
  }
  python3 -m venv "$venv"
fi
. "$venv/bin/activate"
