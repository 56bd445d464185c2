#!/usr/bin/env bash
# What CUDA does to SaxGPT, in ten minutes on any NVIDIA card: tests/benchmarks/gpu.sh [OUT]   (after `make env`; PYTHON=... takes another environment)
# Correctness, decoding and training speed go to OUT/gpu.json and OUT/gpu.md. A part that fails or takes too long is named, and the next one begins.
set -u
cd "$(dirname "$0")/../.."
OUT=${1:-out/gpu}
PYTHON=${PYTHON:-.venv/bin/python}
DEVICE=${DEVICE:-cuda}
TINY=${TINY:+--tiny}
SIZES=${SIZES:-xsmall small medium large xlarge}
mkdir -p "$OUT"

part() { # seconds, what, and the command
    local most=$1 name=$2; shift 2
    echo "== $name"
    timeout -k 10 "$most" "$@" || echo "== $name: failed, or took more than $most s"
}
check() { part "$1" "$2" "$PYTHON" tests/benchmarks/bench_gpu.py "$2" --out "$OUT" --device "$DEVICE" $TINY; }

rm -f "$OUT"/*.json "$OUT"/gpu.md
check 60 machine
check 90 codes
check 60 attention
check 90 training
check 90 find-batch
check 60 processes
part 200 decoding "$PYTHON" tests/benchmarks/bench_generate.py --device "$DEVICE" --sizes $SIZES --train-sizes --lengths --json "$OUT/decoding.json" ${GENERATE:-}
part 200 learning "$PYTHON" tests/benchmarks/bench_train.py --device "$DEVICE" --sizes $SIZES --rounds 1 --out "$OUT/learning.json" ${TRAIN:-}
"$PYTHON" tests/benchmarks/bench_gpu.py report --out "$OUT" --device "$DEVICE"
