#!/usr/bin/env bash
# All that only a GPU can show, in two commands on one machine: see benchmarks/gpu_check.py.
#
#   benchmarks/gpu_check.sh first --out DIR       # at most 7 minutes
#   benchmarks/gpu_check.sh second --out DIR      # at most 4 minutes, at once after it
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
