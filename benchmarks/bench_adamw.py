"""AdamW on bf16 weights: the share of small updates that arrives, and time and memory of a step.

    python benchmarks/bench_adamw.py [--steps 1000] [--plot benchmarks/results/cpu/adamw.png]

Every optimizer gets the same bf16 gradients at learning rate 1e-6. Their means are 0.1 of the noise
and drift, and their size differs between elements (log-normal, σ = 1.5). An update is w_t − w_0.
Two figures compare it with the update of AdamW in fp32 with fp32 states: the relative distance, and
the share of it that arrived, ⟨update, fp32's⟩ / ‖fp32's‖². Stochastic rounding is far off by the
first figure and right by the second, because its errors have mean 0. Then steps are timed beside a
copy that moves as many bytes. The last line is one JSON document.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import matplotlib
import torch
from measure import (
    Case,
    excused,
    finish,
    make_parser,
    pick_device,
    print_table,
    time_alternating,
)
from torch import Tensor, nn

from mr1_fast.kernels.adamw.optimizer import LowMemoryAdamW
from mr1_fast.kernels.adamw.reference import master_weight

LEARNING_RATE = 1e-6
SETTINGS = dict(lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
TRAJECTORY_ELEMENTS = 2**16
TIMED_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}

DRIFT = 200
"""Steps after which half of a mean gradient is new."""


class Method(NamedTuple):
    """An optimizer and the dtype of its weights."""

    dtype: torch.dtype
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    moved: int
    """Bytes per parameter that a step reads and writes: gradient, weight, states without scales."""
    colour: str


def bitsandbytes_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **SETTINGS)


REFERENCE = "torch AdamW, fp32"
METHODS = {
    "ours exact (bf16 + remainder)": Method(
        torch.bfloat16, partial(LowMemoryAdamW, **SETTINGS), 14, "#0072b2"
    ),
    "ours stochastic (bf16)": Method(
        torch.bfloat16, partial(LowMemoryAdamW, **SETTINGS, remainder=False), 10, "#56b4e9"
    ),
    "bitsandbytes 8-bit, fp32 weights": Method(torch.float32, bitsandbytes_adamw, 16, "#009e73"),
    "bitsandbytes 8-bit, bf16 weights": Method(torch.bfloat16, bitsandbytes_adamw, 10, "#d55e00"),
    "torch AdamW, bf16": Method(
        torch.bfloat16, partial(torch.optim.AdamW, **SETTINGS, fused=True), 14, "#cc79a7"
    ),
    REFERENCE: Method(
        torch.float32, partial(torch.optim.AdamW, **SETTINGS, fused=True), 28, "black"
    ),
}


def full_weight(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor:
    """The weight in fp64, including the remainder that the optimizer may keep."""
    remainder = optimizer.state[parameter].get("remainder")
    weight = parameter.detach()
    return (weight if remainder is None else master_weight(weight, remainder)).double()


class Gradients:
    """An endless stream of bf16 gradients (n,)."""

    def __init__(self, n: int, device: str):
        self.generator = torch.Generator(device).manual_seed(0)
        self.normal = lambda: torch.randn(n, generator=self.generator, device=device)
        self.scale = 1e-5 * torch.exp(1.5 * self.normal())
        self.mean = 0.1 * self.normal()

    def next(self) -> Tensor:
        kept = 0.5 ** (1 / DRIFT)
        self.mean = kept * self.mean + (1 - kept**2) ** 0.5 * 0.1 * self.normal()
        return (self.scale * (self.mean + self.normal())).bfloat16()


def trajectories(
    steps: int, device: str, skipped: dict[str, str]
) -> dict[str, dict[str, list[float]]]:
    """Distance of each update from fp32's and share of it that arrived, at 100 steps of the run."""
    gradients = Gradients(TRAJECTORY_ELEMENTS, device)
    start = (0.02 * gradients.normal()).bfloat16()
    running = {}
    for name, method in METHODS.items():
        with excused(name, skipped):
            parameter = nn.Parameter(start.to(method.dtype, copy=True))
            running[name] = parameter, method.make([parameter])
    results = {
        name: {"step": [], "distance": [], "arrived": []} for name in running if name != REFERENCE
    }
    for step in range(1, steps + 1):
        gradient = gradients.next()
        for parameter, optimizer in running.values():
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
        if step % max(1, steps // 100) == 0:
            updates = {name: full_weight(*pair) - start.double() for name, pair in running.items()}
            exact = updates.pop(REFERENCE)
            for name, update in updates.items():
                results[name]["step"].append(step)
                results[name]["distance"].append(((update - exact).norm() / exact.norm()).item())
                results[name]["arrived"].append((update @ exact / (exact @ exact)).item())
    return results


def step_case(method: Method, n: int, device: str) -> tuple[Case, float]:
    """A case of a step over n elements, and the bytes per parameter of weight and state."""
    parameter = nn.Parameter((0.02 * torch.randn(n, device=device)).to(method.dtype))
    parameter.grad = (1e-5 * torch.randn(n, device=device)).to(method.dtype)
    optimizer = method.make([parameter])
    optimizer.step()
    kept = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    return Case(optimizer.step), sum(t.nbytes for t in (parameter.data, *kept)) / n


def timings(n: int, rounds: int, device: str, skipped: dict[str, str]) -> dict[str, dict]:
    """Seconds of each method's step, bytes per parameter, and the time as a multiple of a copy's.

    The copy moves as many bytes as the step.
    """
    source = torch.ones(7 * n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    cases, kept = {"copy": Case(lambda: target.copy_(source))}, {}
    cases["copy"].call()
    for name, method in METHODS.items():
        with excused(name, skipped):
            cases[name], kept[name] = step_case(method, n, device)
    times = time_alternating(cases, rounds, device, skipped)
    copied = times.pop("copy")["median"] / (2 * len(source))
    for name, result in times.items():
        result["bytes_per_parameter"] = kept[name]
        result["nanoseconds_per_element"] = result["median"] / n * 1e9
        result["of_copy"] = result["median"] / (copied * METHODS[name].moved * n)
    return times


def plot(results: dict[str, dict[str, list[float]]], path: str) -> None:
    """Plot both figures over the steps; the legend names every line with its last value."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), dpi=80, layout="constrained")
    titles = "Distance of the update from fp32's (relative)", "Share of fp32's update that arrived"
    for panel, key, title in zip(panels, ("distance", "arrived"), titles, strict=True):
        for name, result in results.items():
            last = f"{result[key][-1]:.2f}" if key == "distance" else f"{result[key][-1]:.0%}"
            style = dict(color=METHODS[name].colour, label=f"{last}  {name}", linewidth=1.8)
            # Both bf16 lines lie on each other: the first is wide, the second dashed.
            if name.endswith("8-bit, bf16 weights"):
                style |= dict(linewidth=5, alpha=0.5)
            if name.startswith("torch"):
                style |= dict(linestyle="--")
            panel.plot(result["step"], result[key], **style)
        panel.set(title=title, xlabel="step", xlim=(0, result["step"][-1]))
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].set(ylim=(-0.05, 1.2))
    panels[1].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    for panel in panels:
        panel.legend(
            title="after the last step",
            loc="upper center",
            bbox_to_anchor=(0.5, -0.15),
            frameon=False,
        )
    figure.savefig(path)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--elements", type=int, help="of a timed step; default 2**22, on a GPU 2**28"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plot", help="write the trajectories to this PNG")
    arguments = parser.parse_args()
    device, skipped = pick_device(arguments.device), {}
    n = arguments.elements or TIMED_ELEMENTS[device]

    results = trajectories(arguments.steps, device, skipped)
    columns = ["optimizer", "distance from fp32's update", "share that arrived"]
    rows = [
        [name, f"{r['distance'][-1]:.3g}", f"{r['arrived'][-1]:.1%}"] for name, r in results.items()
    ]
    title = f"After {arguments.steps:,} steps at {LEARNING_RATE:g}, {TRAJECTORY_ELEMENTS:,} weights"
    print_table(title, columns, rows)
    if arguments.plot:
        plot(results, arguments.plot)

    times = timings(n, arguments.rounds, device, skipped)
    columns = [
        "optimizer",
        "bytes per parameter (weight and state)",
        "ns per element",
        "× a copy of the bytes it moves",
    ]
    keys = {"bytes_per_parameter": ".2f", "nanoseconds_per_element": ".3g", "of_copy": ".2f"}
    rows = [
        [name, *(f"{taken[key]:{digits}}" for key, digits in keys.items())]
        for name, taken in times.items()
    ]
    print_table(f"A step over {n:,} elements on {device}", columns, rows)
    settings = {"steps": arguments.steps, "elements": n, "rounds": arguments.rounds}
    settings["lr"] = LEARNING_RATE
    finish("adamw", device, settings=settings, trajectories=results, times=times, skipped=skipped)


if __name__ == "__main__":
    main()
