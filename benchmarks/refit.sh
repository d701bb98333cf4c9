#!/usr/bin/env bash
# The full run of benchmarks/refit.py, the most telling parts first. Arms that are in refit.jsonl are not run again, so
# it can be stopped at any time and started again:  OMP_NUM_THREADS=1 nohup bash benchmarks/refit.sh >refit.log 2>&1 &
set -euo pipefail
cd "$(dirname "$0")"
arms() { "${PYTHON:-python}" refit.py --results refit.jsonl "$@" >/dev/null; }

small=(--steps 240 --shorter 20 40 80)
large=(--steps 100 --shorter 8 17 33)

# Half of the parameters, by width.
arms --models 260k 656k --targets "width 50" "${small[@]}"
arms --models quickstart --targets "width 50" "${large[@]}"
arms --models 260k 656k --targets "width 50" --seeds 1 2 "${small[@]}"
# Where the lead ends: ten times as long, each method at the best rate of its shorter run.
arms --models 656k 260k --targets "width 50" --steps 2400 --rates-of-steps 240
arms --models quickstart --targets "width 50" --seeds 1 2 "${large[@]}"
# After pruning alone, both modes.
everything=("width 25" "width 50" "width 66")
arms --models 260k 656k --targets "${everything[@]}" --seeds 0 1 2 --steps 0 --methods minitron refit "refit, sequential"
arms --models 260k --targets "without 0" "without 2" "without 2+3" --seeds 0 1 2 --steps 0 --methods minitron refit "refit, sequential"
arms --models quickstart --targets "${everything[@]}" "without 0" "without 4" "without 4+5" --steps 0 --methods minitron refit "refit, sequential"
# A quarter, two thirds, and by depth.
arms --models 656k --targets "width 25" "width 66" "without 1" "${small[@]}"
arms --models 260k --targets "width 25" "width 66" "without 0" "without 2+3" "${small[@]}"
arms --models quickstart --targets "width 66" "width 25" "without 0" "without 4+5" "${large[@]}"
# More seeds of these.
arms --models 656k --targets "width 25" "width 66" "without 1" --seeds 1 2 "${small[@]}"
arms --models 260k --targets "width 25" "width 66" "without 0" "without 2+3" --seeds 1 2 "${small[@]}"
arms --models quickstart --targets "width 66" "width 25" "without 0" "without 4+5" --seeds 1 2 "${large[@]}"
