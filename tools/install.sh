#!/usr/bin/env bash
# Make a virtual environment, put a fitting PyTorch into it, then hand the rest to pip.
#
#   tools/install.sh VENV PIP_ARGUMENT...       tools/install.sh .venv -e '.[dev]'
#
#   PYTHON         interpreter that makes the environment      (python3)
#   TORCH_VERSION  version for a machine without a GPU         (2.13.0)
#   TORCH_INDEX    package index with PyTorch's CPU builds     (PyTorch's own)
#
# PyTorch comes first and alone. On Linux, PyPI's build brings gigabytes of CUDA libraries, of no use without a
# GPU, and which build to take is not something that pyproject.toml can say.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: tools/install.sh VENV PIP_ARGUMENT..." >&2
    exit 2
fi
venv=$1
shift
torch="torch==${TORCH_VERSION:-2.13.0}"
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

say() { echo "install: $*" >&2; }

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# Without --no-deps every dependency would be asked of the extra index too; the last step installs them from PyPI.
install_torch() { pip install --quiet --no-deps --only-binary :all: "$@"; }

make_environment() {
    [ -x "$venv/bin/python" ] && return
    say "making $venv"
    if ! "${PYTHON:-python3}" -m venv "$venv"; then
        rm -rf "$venv"
        say "'${PYTHON:-python3} -m venv' failed; on Debian and Ubuntu: apt install python3-venv"
        exit 1
    fi
}

has_torch() {
    "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
}

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# Cheapest first: a wheel that pip's own configuration already offers, then PyTorch's index (one look-up, short
# timeouts: an index that does not answer must not hold up the build), then whatever PyPI has.
choose_torch() {
    if has_gpu; then
        say "a GPU is visible: installing PyPI's torch"
        install_torch "torch>=2.8"
        return
    fi
    if [ "$(uname -s)" = Linux ]; then
        say "no GPU: looking for a CPU build of $torch"
        install_torch "$torch+cpu" 2>/dev/null && return
        install_torch --index-url "$index" --timeout 10 --retries 1 "$torch+cpu" 2>/dev/null && return
        say "no CPU build found; PyPI's torch brings the CUDA libraries, which takes a while"
    fi
    install_torch "$torch"
}

make_environment
has_torch || choose_torch
say "pip install $*"
pip install --quiet "$@"
