#!/bin/sh
# Installs the wheel of dist/ in a new environment and runs the demo from another folder.
# Its dependencies are those of $VENV, by a path: to install torch once more would take minutes. The
# editable installation in $VENV is not seen that way; pip check holds what the wheel declares.
set -eu
wheel=$(ls "$PWD"/dist/*.whl)
venv=$(cd "$VENV" && pwd)
found=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv --without-pip "$work/venv"
bin="$work/venv/bin"
pip="$venv/bin/python -m pip --disable-pip-version-check --python $bin/python"
$pip install --quiet --no-deps "$wheel"
own=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$found" > "$own/dependencies.pth"
cd "$work"
$pip check
"$bin/python" -c 'import engine, pathlib, sys; sys.exit(not pathlib.Path(engine.__file__).is_relative_to(sys.prefix))'
export XDG_STATE_HOME="$work/state"
"$bin/rlhf-tui" completion bash > /dev/null
test -f "$work/venv/share/man/man1/rlhf-tui.1"
"$bin/rlhf-tui" demo --headless --steps 5 --sessions "$work/sessions"
"$bin/rlhf-tui" ls --sessions "$work/sessions"
