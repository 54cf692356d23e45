#!/bin/sh
# Creates $VENV. Without an NVIDIA driver it installs torch's CPU build, if the package index has it:
# the default build downloads several GB of CUDA packages.
set -eu
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "rlhf-tui needs Python 3.11 or newer; select one with: make PYTHON=python3.12 setup" >&2
    exit 1
}
echo "installing into $VENV: about 2 GB, a few minutes (more with a GPU)" >&2
test -x "$VENV/bin/python" || "$PYTHON" -m venv "$VENV"
torch=$(sed -n 's/^torch==//p' constraints.txt)
pip="$VENV/bin/python -m pip install --quiet --disable-pip-version-check"
if ! command -v nvidia-smi >/dev/null 2>&1; then
    $pip "torch==$torch+cpu" 2>/dev/null || {
        echo "Your package index has no CPU build of torch $torch: installing the default build," >&2
        echo "which is large. To avoid this, set PIP_EXTRA_INDEX_URL to PyTorch's CPU index." >&2
    }
fi
$pip -c constraints.txt -e '.[dev]'
