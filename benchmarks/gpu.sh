#!/usr/bin/env bash
# What needs a GPU, within some seconds (default 540): every launch setting of the kernels is checked
# against fp64, then timed; then come the benchmarks that have no result for this GPU and these
# sources, the most valuable first. What does not fit is named, and nothing that has ended is lost.
#
#     benchmarks/gpu.sh [SECONDS] [NAME ...]     names: run these, also where there is a result
#     benchmarks/gpu.sh --dry-run                what would run, and its expected seconds
#     benchmarks/gpu.sh --tiny 3600              try every item on a CPU, with tiny sizes
#
# Results go to benchmarks/results/<gpu>/, winning launch settings to mr1_fast/kernels/tuned.json. If
# the working tree does not come back from the machine, set $OUT (default: build/gpu) to a folder that
# does. It gets few files, all up to date after each item:
#
#     results.tar.gz   all of the above; bring it back by   tar -xzf $OUT/results.tar.gz
#                      here, before the next call, which then goes on where this one has ended
#     tuned.json       the launch settings alone, for mr1_fast/kernels/tuned.json
#     summary.txt, summary.json, log.txt      what became of each item, and all output
#
# Then commit benchmarks/results/<gpu>/ and mr1_fast/kernels/tuned.json.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 benchmarks/gpu_queue.py "$@"
