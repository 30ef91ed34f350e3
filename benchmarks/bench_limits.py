"""The limits of this machine: a copy, a read, and a matrix product, with the clock it runs at.

    python benchmarks/bench_limits.py [--megabytes 2048] [--size 8192]

The copy counts bytes read and written, the read bytes read. The product is of two bf16 matrices of
--size, on random data; its clock is the multiprocessors' while it runs again and again. Prints a
Markdown table; the last line is one JSON document.
"""

import torch
from device_time import sm_clock
from measure import (
    Case,
    copy_case,
    finish,
    make_parser,
    pick_device,
    print_table,
    read_case,
    time_alternating,
)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--megabytes", type=int, help="default 2048, on a CPU 256")
    parser.add_argument("--size", type=int, help="default 8192, on a CPU 512")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    megabytes = arguments.megabytes or (2048 if device == "cuda" else 256)
    size = arguments.size or (8192 if device == "cuda" else 512)
    source = torch.randn(megabytes, 2**18, device=device)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    cases = {
        "copy": copy_case(source),
        "read": read_case(source),
        "product": Case(lambda: (torch.mm(a, b, out=product), [])),
    }
    for case in cases.values():
        case.call()
    times = time_alternating(cases, arguments.rounds, device, {})
    moved = {"copy": 2 * source.nbytes, "read": source.nbytes, "product": 2 * size**3}
    for name, taken in times.items():
        taken["per_second"] = moved[name] / taken["median"]
    times["product"]["sm_mhz"] = sm_clock(cases["product"].call, times["product"]["median"], device)
    units = {"copy": (1e9, "GB/s"), "read": (1e9, "GB/s"), "product": (1e12, "TFLOP/s")}
    table = [
        [name, f"{taken['median'] * 1e3:.3f}", f"{taken['per_second'] / scale:,.2f} {unit}"]
        for (name, taken), (scale, unit) in zip(times.items(), units.values(), strict=True)
    ]
    clock = times["product"]["sm_mhz"]
    title = f"Limits, on {device}; {clock or 'unknown'} MHz under matrix products"
    print_table(title, ["what", "ms", "rate"], table)
    settings = {"megabytes": megabytes, "size": size, "rounds": arguments.rounds}
    finish("limits", device, settings=settings, times=times)


if __name__ == "__main__":
    main()
