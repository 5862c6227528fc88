#!/usr/bin/env bash
# Make .venv with everything the project needs. Does nothing when that is already done.
# Needs only the package registries (Debian/Ubuntu's and PyPI).
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.set-up
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ "$(.venv/bin/python -c 'import sys; print(sys.prefix)' 2>/dev/null)" = "$PWD/.venv" ]; then
    exit 0
fi

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

usable() { # a Python of a tried version that can make virtual environments and has its C headers
    "$1" - >/dev/null 2>&1 <<'PY'
import ensurepip, os, sys, sysconfig, venv
assert (3, 10) <= sys.version_info[:2] <= (3, 12)
assert os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
PY
}

find_python() {
    for candidate in ${PYTHON:-} python3 python3.12 python3.11 python3.10 /usr/bin/python3; do
        if usable "$candidate"; then echo "$candidate"; return; fi
    done
}

missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v pkg-config >/dev/null || missing+=(pkg-config)
pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
[ -n "$(find_python)" ] || missing+=(python3 python3-venv python3-dev)

if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ]; then as_root=(env)
    elif sudo -n true 2>/dev/null || { [ -t 0 ] && command -v sudo >/dev/null; }; then as_root=(sudo env)
    else say "error: please install: ${missing[*]}  (apt-get install ${missing[*]}), then start again"; exit 1
    fi
    say "installing system packages: ${missing[*]}"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

python=$(find_python)
if [ -z "$python" ]; then say "error: no Python 3.10 to 3.12 with venv and headers found; set PYTHON=/path/to/python"; exit 1; fi
say "making .venv with $("$python" --version) (downloads about 3 GB the first time)"
rm -rf .venv
"$python" -m venv .venv
# Most of what is installed is never imported: compiling all of it would take a minute.
.venv/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[test]'
# What is imported is compiled once, here, and by numba what cuts crops; where bytecode may not be written, every start
# would do it again (10 s).
compile() { env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -W ignore -c "$1"; }
compile 'from harmony_fast.engine.data.crops import compile_ahead; compile_ahead()' &
compile '
import harmony_fast.engine.train, harmony_fast.engine.report, harmony_fast.engine.plan, bitsandbytes, hypothesis, pytest
import sklearn.linear_model, tensorboard, torchmetrics, transformers
'
wait $!
echo "$wanted" > "$stamp"
