#!/usr/bin/env bash
# Runs the paper's experiments on a GPU that is there for MINUTES, in order of value, and goes on
# with the next call where this one ended: scripts/gpu_reproduce.sh MINUTES [OUT]
#
# Needs no network: this checkout, a Python with the packages of pyproject.toml (PYTHON=…), and MNIST
# (CAPSRUN_DATA=…). Runs stay in runs/. OUT (default: runs/gpu) gets the small files to keep, every
# few minutes and in the end: results.tar.gz (what `capsrun report keep=` keeps, and the report),
# report.html, bench.json, log.txt and one half-precision checkpoint.
# BUDGET=smoke DEVICE=cpu PARALLEL=1 tries it on a CPU.
set -uo pipefail
minutes=${1:?how many minutes? scripts/gpu_reproduce.sh MINUTES [OUT]}
[[ $minutes =~ ^[1-9][0-9]*$ ]] || { echo "MINUTES is $minutes, not a whole number" >&2; exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
out=$(realpath -m "${2:-$here/runs/gpu}")
cd "$here" || exit
mkdir -p "$out" || exit
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3} budget=${BUDGET:-full} device=${DEVICE:-cuda} parallel=${PARALLEL:-3}
queue=(reproduce queue=gpu "budget=$budget" "device=$device" "parallel=$parallel")
# What is found must be saved, for which a run has a minute, and packed before the time is over.
deadline=$(($(date +%s) + 60 * minutes - 120))

capsrun() { "$python" -m capsrun "$@"; }
left() { echo $((deadline - $(date +%s))); }

pack() (
  flock 9 # one at a time
  capsrun report "keep=$out/.packed/results" "out_dir=$out/.packed/report" || exit
  cp "$out/.packed/report/report.html" "$out/"
  tar czf "$out/.results" -C "$out/.packed" results report && mv "$out/.results" "$out/results.tar.gz"
  best=runs/$budget/table1_mnist_3_reconstruction/seed0
  if [ -e "$best/result.json" ]; then
    "$python" scripts/half_precision.py "$best" "$out/capsnet-mnist.pt"
  fi
) 9>"$out/.lock"

work() {
  # The plan may take a tenth of the time; on a slow machine it is made without timing anything.
  plan=("${queue[@]}" "minutes=$minutes" only_plan=true)
  timeout $((6 * minutes)) "$python" -m capsrun "${plan[@]}" ||
    capsrun "${plan[@]}" timing=false || return
  if [ ! -e runs/bench-mnist/bench.json ] && [ "$(left)" -gt 0 ]; then
    timeout "$(left)" "$python" -m capsrun bench "device=$device" rounds=5
  fi
  cp runs/bench-mnist/bench.json "$out/" 2>/dev/null
  if [ "$(left)" -gt 0 ]; then
    (while sleep 150; do pack; done) >/dev/null 2>&1 &
    packing=$!
    capsrun "${queue[@]}" timing=false "minutes=$(awk "BEGIN { print $(left) / 60 }")"
    ended=$?
    kill "$packing" 2>/dev/null
    wait "$packing" 2>/dev/null
  fi
  pack
  return "${ended:-0}"
}

work 2>&1 | tee -a "$out/log.txt"
