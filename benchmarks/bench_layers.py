"""What one text layer and one vision block launch, move and take, beside their matrix products.

    python benchmarks/bench_layers.py [--models 2B 7B 2.5-3B 3-2B …] [--timed 2B]
        [--variants transformers]

- Launches and bytes are counted on any machine, on meta tensors of the models' real sizes:
  operators that PyTorch dispatches, and Triton kernels (count_kernels.py says what is counted).
  6,144 tokens are two prompts of 640 with an image each, and 8 completions of 304 behind each;
  4,096 patches are the two images. "alone" are the launches that are element-wise, or a copy, on
  all tokens of at least a hidden state's size; GB are those of all but products and attention
- On a GPU the models of --timed are also timed: alternating calls, beside the same layer's matrix
  products alone, in the model's dtype, those of the recomputation included. The host's time, until
  it has queued a call's kernels, is in brackets. MFU counts no recomputation, and of attention the
  visible pairs alone; its peak is the rate of a large product in the same run. Kernels are those
  that torch's profiler sees. Peak memory excludes weights, gradients and the layer's input

Variants: the modules of transformers; ours, fused; transformers' with Liger's operators; and
torch.compile of the layer, which is timed where all weights are trained, as each takes a minute.
Numbers of --quick are of a tiny model, also on a CPU. Prints Markdown tables; the last line is one
JSON document.
"""

from layer_counts import count
from layer_parts import MODELS, QUICK_WORK, WORK
from layer_times import time_layers
from layer_variants import VARIANTS
from measure import finish, make_parser, pick_device


def main() -> None:
    parser = make_parser(__doc__)
    known = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--models", nargs="+", choices=known, default=known)
    parser.add_argument("--timed", nargs="*", choices=known, default=known[:1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script out")
    arguments = parser.parse_args()
    arguments.device = pick_device(arguments.device)
    if arguments.quick:
        arguments.models = arguments.timed = ["tiny"]
    elif arguments.device == "cpu":
        arguments.timed = []
    counts = count(arguments.models, arguments.variants, QUICK_WORK if arguments.quick else WORK)
    times = time_layers(arguments.timed, arguments)
    chosen = {"rounds": arguments.rounds, "quick": arguments.quick}
    finish("layers", arguments.device, settings=chosen, counts=counts, times=times)


if __name__ == "__main__":
    main()
