#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests first, then each benchmark that has no result for this GPU yet.
# Results go to $OUT (default: benchmarks/results/<gpu>); copy them there and commit them.
set -uo pipefail
cd "$(dirname "$0")/.."
gpu=$(python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || exit 1
kept="benchmarks/results/$gpu"
out="${OUT:-$kept}"
mkdir -p "$out"
if command -v nvcc > /dev/null; then python setup.py -q build_ext --inplace; fi # else carry mr1_fast/_c*.so along
python -m mr1_fast.env | tee "$out/env.txt"
python -m pytest -m 'not slow' 2>&1 | tail -n 20 | tee "$out/tests.txt"

bench() { # name, command …: the benchmark's last line is its JSON result
    local name=$1
    shift
    [ -e "$kept/$name.json" ] && return
    timeout 300 "$@" > "$out/$name.txt" 2>&1 && tail -n 1 "$out/$name.txt" > "$out/$name.json"
    echo "$name: exit $?"
}

bench default_run python benchmarks/bench_default_run.py --seeds 0
bench grpo_loss python benchmarks/bench_grpo_loss.py
bench grpo_loss_sweep python benchmarks/bench_grpo_loss.py --sweep
bench linear_grpo_loss python benchmarks/bench_linear_grpo_loss.py
bench adamw python benchmarks/bench_adamw.py --plot "$out/adamw.png"
bench train_step python benchmarks/bench_train_step.py
bench memory_2b python benchmarks/bench_memory.py 2b_full
bench memory_7b python benchmarks/bench_memory.py 7b_qlora
