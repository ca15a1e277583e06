#!/usr/bin/env bash
# Creates the virtual environment given as the first argument, with system packages, dependencies and the package itself.
# Environment: PYTHON (interpreter, 3.11 or newer), TORCH (requirement for torch, pinned so that the choice is ours).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: tools/install.sh VENV}
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "kvstrata needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON=..." >&2
  exit 1
}

# -- system packages: what is missing is named, and installed where that is allowed ------------------------------------
header() { echo "#include <$1>" | c++ -E -x c++ - >/dev/null 2>&1; }
library() { ldconfig -p 2>/dev/null | grep -q "$1"; }
missing=()
command -v c++ >/dev/null || missing+=(g++)
command -v redis-server >/dev/null || missing+=(redis-server)
header xxhash.h || missing+=(libxxhash-dev)
header doctest/doctest.h || missing+=(doctest-dev)
library libibverbs.so.1 || missing+=(libibverbs1) # these three are Mooncake's
library libnuma.so.1 || missing+=(libnuma1)
library libcurl.so.4 || missing+=(libcurl4)
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
"$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || missing+=(python3-dev)
if ((${#missing[@]})); then
  as_root=()
  if [ "$(id -u)" != 0 ]; then as_root=(sudo -n); fi
  if command -v apt-get >/dev/null && "${as_root[@]}" true 2>/dev/null; then
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
  else
    echo "Please install these system packages, then run this again:" >&2
    echo "  sudo apt-get install ${missing[*]}" >&2
    exit 1
  fi
fi

# -- the environment -----------------------------------------------------------------------------------------------------
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install --upgrade 'pip>=24'
pip install "$torch" 'scikit-build-core>=0.11,<2' 'nanobind>=2.9,<4' 'cmake>=3.22' ninja
pip install --no-build-isolation --editable '.[dev]'
"$venv/bin/python" -c 'import kvblocks._native, flexkv._native, kvrouter._native, folovllm._native'
