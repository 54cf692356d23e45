#!/bin/sh
# Makes $VENV. On a machine without an NVIDIA driver torch's CPU build is asked for first: the
# default build brings several GB of CUDA packages that nothing there could use.
set -eu
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "rlhf-tui needs Python 3.11 or newer; name one with: make PYTHON=python3.12 setup" >&2
    exit 1
}
test -x "$VENV/bin/python" || "$PYTHON" -m venv "$VENV"
torch=$(sed -n 's/^torch==//p' constraints.txt)
pip="$VENV/bin/python -m pip install --quiet --disable-pip-version-check"
if ! command -v nvidia-smi >/dev/null 2>&1; then
    $pip "torch==$torch+cpu" 2>/dev/null || {
        echo "No CPU build of torch $torch on your package index: installing the default build," >&2
        echo "which is large. To avoid it, point PIP_EXTRA_INDEX_URL at PyTorch's CPU index." >&2
    }
fi
$pip -c constraints.txt -e '.[dev]'
