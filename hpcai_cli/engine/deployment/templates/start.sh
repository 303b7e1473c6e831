#!/bin/sh
# Starts the server of the model {{name}}; further words are the server's options (--help lists them).
#
# HPCAI_HOST     address to listen on (127.0.0.1)
# HPCAI_PORT     port (8000)
# HPCAI_WORKERS  processes that answer
# HPCAI_PYTHON   a Python that has the packages of requirements.txt; without it they are installed at the first start
# HPCAI_VENV     where they are installed (.venv beside this file)
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${HPCAI_PYTHON:-}
if [ -z "$python" ]; then
    venv=${HPCAI_VENV:-$here/.venv}
    python=$venv/bin/python
    # The copy is made last, so that an installation that was interrupted is done again.
    if ! cmp -s "$here/requirements.txt" "$venv/installed.txt"; then
        echo "installing the packages of requirements.txt into $venv" >&2
        "$(command -v python{{python}} || echo python3)" -m venv "$venv" >&2
        "$python" -m pip install -q --disable-pip-version-check --no-cache-dir -r "$here/requirements.txt" >&2
        cp "$here/requirements.txt" "$venv/installed.txt"
    fi
fi
# Without it Python would look for modules where this was called from.
export PYTHONSAFEPATH=1 PYTHONPATH="$here/lib"
exec "$python" -m hpcai_cli.engine.serving.server "$here/model" \
    --host "${HPCAI_HOST:-127.0.0.1}" --port "${HPCAI_PORT:-8000}" \
    ${HPCAI_WORKERS:+--workers "$HPCAI_WORKERS"} "$@"
