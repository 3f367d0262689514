#!/usr/bin/env bash
# Makes the environment and runs the tests; arguments go to pytest.
#
#     bash tests/run.sh [-k NAME] [--require-gpu] ...
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tests/environment.sh test

# tests read nothing from the network and report nothing to it
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

exec .venv/bin/python -m pytest "$@"
