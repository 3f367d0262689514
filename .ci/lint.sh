#!/usr/bin/env bash
# Style, formatting and types, as pyproject.toml configures them.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tests/environment.sh test

.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
