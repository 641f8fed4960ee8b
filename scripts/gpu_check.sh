#!/usr/bin/env bash
# Checks the CUDA kernels on a machine with a GPU, without network, within 10 minutes: builds in place, runs the tests,
# compares with the CPU, runs compute-sanitizer and the benchmarks, and writes gpu_check.json and gpu_check.md.
# Usage: scripts/gpu_check.sh [--out DIR] [--budget SECONDS] [--rehearse]
# PYTHON names the interpreter that has torch; default: python3.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
