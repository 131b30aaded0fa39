#!/usr/bin/env bash
# Install what the tests need and run every check.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
python -m pip install --quiet --constraint scripts/constraints.txt --editable '.[dev]'
exec scripts/check
