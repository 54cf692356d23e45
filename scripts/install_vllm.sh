#!/bin/sh
# Creates $VENV for rollout.engine=vllm: vLLM's CPU build with what it imports, about 1.8 GB.
# It is separate from .venv because vLLM needs an older transformers than the trainer.
set -eu
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
    echo "the environment for vLLM needs Python 3.11 to 3.13; select one with: make PYTHON=python3.12 vllm" >&2
    exit 1
}
test -x "$VENV/bin/python" || "$PYTHON" -m venv "$VENV"
torch=$(sed -n 's/^torch==//p' requirements-vllm.txt)
pip="$VENV/bin/python -m pip install --quiet --disable-pip-version-check"
$pip "torch==$torch+cpu" 2>/dev/null || $pip "torch==$torch" 
# Without its dependencies: its list asks for torchvision and torchaudio wheels that do not go with
# this torch, and nothing here imports them.
grep -v '^#' requirements-vllm-nodeps.txt >"$VENV/nodeps.txt"
