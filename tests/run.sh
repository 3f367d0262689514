#!/usr/bin/env bash
# Makes the environment and runs the tests, without arguments in two processes; arguments go to pytest.
#
#     bash tests/run.sh [-k NAME] [--require-gpu] ...
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tests/environment.sh test

# tests read nothing from the network and report nothing to it
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

# without a GPU most of the time is one thread's, in Triton's interpreter; a few tests start in one process sooner
if [[ "$(nvidia-smi -L 2>/dev/null)" != GPU* ]]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    [ $# -gt 0 ] || set -- --numprocesses 2 --dist worksteal
fi

exec .venv/bin/python -m pytest "$@"
