# Sourced by demo, test and check: leaves a Python with this checkout and the wanted extras in $python.
# LIGHTNING_PRUNE_PYTHON=/path/to/python skips the setup and takes that one as it is.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The first Python that is new enough; PYTHON=... is asked first.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python python3.13 python3.12 python3.11 python3.10; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "No Python 3.10 or newer found; set PYTHON=/path/to/python." >&2
    return 1
}

# use_environment EXTRAS: creates .venv in the checkout if there is none, and installs what is not installed yet.
use_environment() {
    local extras=$1 base stamp state
    if [ -n "${LIGHTNING_PRUNE_PYTHON:-}" ]; then
        python=$LIGHTNING_PRUNE_PYTHON
        export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    else
        python="$PWD/.venv/bin/python"
        stamp=".venv/installed-${extras//,/-}"
        state="$PWD $(cksum < pyproject.toml)"
        if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$state" ]; then
            base=$(find_python)
            # Some systems ship Python without ensurepip: then the system's own pip installs into .venv.
            [ -x "$python" ] || "$base" -m venv .venv 2>/dev/null || "$base" -m venv --clear --without-pip .venv
            if "$python" -m pip --version >/dev/null 2>&1; then
                "$python" -m pip install --quiet --editable ".[$extras]"
            else
                "$base" -m pip --python "$python" install --quiet --editable ".[$extras]"
            fi
            echo "$state" > "$stamp"
        fi
    fi
    # What libraries keep in the home or temp directory stays in the checkout.
    mkdir -p .cache/tmp
    export TMPDIR="$PWD/.cache/tmp" XDG_CACHE_HOME="$PWD/.cache" XDG_CONFIG_HOME="$PWD/.cache/config"
    export TORCH_HOME="$PWD/.cache/torch" FVCORE_CACHE="$PWD/.cache/fvcore" MPLCONFIGDIR="$PWD/.cache/matplotlib"
    export TORCHINDUCTOR_CACHE_DIR="$PWD/.cache/inductor" TRITON_CACHE_DIR="$PWD/.cache/triton"
}
