#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests first, then each benchmark that has no result for this GPU yet.
# Results go to $OUT (default: benchmarks/results/<gpu>); copy them there and commit them. Names as arguments choose
# among the tests and benchmarks: benchmarks/gpu.sh tests rollout. The tests may take $TEST_SECONDS (default 600), a
# benchmark $BENCH_SECONDS (default 300); what was printed by then is kept.
set -uo pipefail
cd "$(dirname "$0")/.."
gpu=$(python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || exit 1
kept="benchmarks/results/$gpu"
out="${OUT:-$kept}"
chosen=" $* "
mkdir -p "$out"
if command -v nvcc > /dev/null && ! [ -e mr1_fast/_cuda.so ]; then python setup.py -q build_ext --inplace; fi
python -m mr1_fast.env | tee "$out/env.txt"

if [ $# -eq 0 ] || [[ $chosen == *" tests "* ]]; then
    parallel=$(python -c 'import xdist; print("-n 8")' 2> /dev/null)
    timeout -s INT "${TEST_SECONDS:-600}" python -m pytest -m 'not slow' $parallel > "$out/tests.txt" 2>&1
    echo "tests: exit $?"
    tail -n 30 "$out/tests.txt"
fi

bench() { # name, command …: the benchmark's last line is its JSON result
    local name=$1 status began=$SECONDS
    shift
    if [[ $chosen != "  " ]]; then [[ $chosen == *" $name "* ]] || return; else [ -e "$kept/$name.json" ] && return; fi
    timeout "${BENCH_SECONDS:-300}" "$@" > "$out/$name.txt" 2>&1
    status=$?
    [ $status -eq 0 ] && tail -n 1 "$out/$name.txt" > "$out/$name.json"
    echo "$name: exit $status after $((SECONDS - began)) s"
}

bench rollout python benchmarks/bench_rollout.py
bench decode_step python benchmarks/bench_decode_step.py
bench memory_2b python benchmarks/bench_memory.py 2b_full
bench grpo_loss python benchmarks/bench_grpo_loss.py
bench train_step python benchmarks/bench_train_step.py
bench linear_grpo_loss python benchmarks/bench_linear_grpo_loss.py
bench integrations python benchmarks/bench_integrations.py
bench trl_2b python benchmarks/bench_train_step.py --parts update --layers 28
bench memory_7b python benchmarks/bench_memory.py 7b_qlora
bench adamw python benchmarks/bench_adamw.py --plot "$out/adamw.png"
bench default_run python benchmarks/bench_default_run.py --seeds 0
bench grpo_loss_sweep python benchmarks/bench_grpo_loss.py --sweep

# The paper's comparison with 17M parameters and five seeds. What a time limit cuts off goes on where $OUT is kept.
if [[ $chosen == *" experiment "* ]] || { [ $# -eq 0 ] && ! [ -e "$kept/experiment_small/report.md" ]; }; then
    timeout "${EXPERIMENT_SECONDS:-3600}" python -m mr1_fast.experiment --preset small --output "$out/experiment_small" \
        > "$out/experiment_small.txt" 2>&1
    echo "experiment: exit $?"
fi
