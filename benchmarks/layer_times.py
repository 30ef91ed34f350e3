"""Times of the layers that bench_layers.py compares, beside their matrix products alone."""

import argparse
from typing import NamedTuple

import torch
from count_kernels import Product
from layer_counts import ALL_WEIGHTS, Setting, launches, settings
from layer_parts import QUICK_WORK, WORK, Part, real_part
from layer_variants import FORWARD, RECOMPUTED, STORED, VARIANTS, Way, pieces, run_pass
from measure import Case, excused, megabytes, peak, print_table, release, time_alternating
from torch import Tensor

TIMED = (FORWARD, RECOMPUTED)
"""The passes that are timed."""
BASELINE = "transformers"
LIMIT = "its matrix products alone"
PEAK_SIZE, QUICK_PEAK_SIZE = 8192, 256
"""Rows and columns of the product whose rate is MFU's peak."""


class Timed(NamedTuple):
    """A layer on a device, and the ways to compute it that work there."""

    part: Part
    gradient: Tensor
    """Of the hidden states after the layer."""
    ways: dict[str, Way]
    off: dict[str, dict]
    """By variant: relative differences of output and gradients from the baseline's."""

    def case(self, variant: str, name: str) -> Case:
        """A pass of a variant; its gradients are the input's and the parameters'."""
        way = self.ways[variant]
        inputs = pieces(way, self.part.x)

        def call():
            outputs, received = run_pass(name, way, inputs, self.gradient)
            given = [p.grad for p in self.part.trained if p.grad is not None]
            return outputs[0].detach(), [*received, *given]

        return Case(call, lambda: self.part.layer.zero_grad(set_to_none=True))


def prepare(part: Part, variants: list[str], skipped: dict[str, str]) -> Timed:
    """Build every variant, call it once for each pass, and compare it with the first that works."""
    gradient = torch.randn_like(part.x)
    found = Timed(part, gradient, {}, {})
    expected = None
    for variant in variants:
        with excused(variant, skipped):
            way = VARIANTS[variant](part)
            for name in TIMED:
                part.layer.zero_grad(set_to_none=True)
                outputs, received = run_pass(name, way, pieces(way, part.x), gradient)
            values = [sum(outputs).detach(), received[0], *(p.grad for p in part.trained)]
            expected = expected or values
            pairs = zip(values, expected, strict=True)
            off = [distance(a, b) for a, b in pairs]
            found.ways[variant] = way
            found.off[variant] = {"output": off[0], "input": off[1], "weights": max(off[2:])}
    part.layer.zero_grad(set_to_none=True)
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Relative difference of `a` from `b`."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def products_case(products: list[Product], device: str, dtype: torch.dtype) -> Case:
    """A case of matrix products alone, one after the other, each into an existing matrix."""
    matrices: dict[tuple, Tensor] = {}

    def matrix(role: str, rows: int, columns: int, dtype: torch.dtype, transposed: bool) -> Tensor:
        key = role, rows, columns, dtype, transposed
        if key not in matrices:
            shape = (columns, rows) if transposed else (rows, columns)
            x = torch.randn(shape, device=device, dtype=dtype)
            matrices[key] = x.T if transposed else x
        return matrices[key]

    calls = []
    for m, k, n, _, count, transposed in products:
        a = matrix("a", m, k, dtype, transposed[0])
        b = matrix("b", k, n, dtype, transposed[1])
        calls += [(a, b, matrix("out", m, n, dtype, False))] * count

    def call():
        for a, b, out in calls:
            torch.mm(a, b, out=out)
        return out, []

    return Case(call)


def kernels(case: Case, device: str) -> int | None:
    """The number of CUDA kernels of one call; None on a CPU."""
    if device == "cpu":
        return None
    case.restore()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        case.call()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def time_setting(setting: Setting, arguments: argparse.Namespace, variants: list[str]) -> dict:
    """Time the passes of one setting by every variant, beside its matrix products alone."""
    device, skipped = arguments.device, {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    work, size = (QUICK_WORK, QUICK_PEAK_SIZE) if arguments.quick else (WORK, PEAK_SIZE)
    torch.manual_seed(0)
    part = real_part(setting.model, setting.kind, setting.training, device, dtype, work)
    timed = prepare(part, variants, skipped)

    flop, cases = {}, {}
    for name in TIMED:
        found, _ = launches(setting, BASELINE, name, work)
        products = [each.product for each in found if each.product]
        # MFU is of the operations that a pass needs, which recomputation does not add to.
        needed, _ = launches(setting, BASELINE, STORED if name == RECOMPUTED else name, work)
        attention = part.attention_flop * (1 if name == FORWARD else 3)
        model_flop = attention + sum(each.product.flop for each in needed if each.product)
        for variant in timed.ways:
            cases[f"{variant}: {name}"] = timed.case(variant, name)
            flop[f"{variant}: {name}"] = model_flop
        cases[f"{LIMIT}: {name}"] = products_case(products, device, dtype)
        flop[f"{LIMIT}: {name}"] = sum(product.flop for product in products)
    cases["peak"] = products_case([Product(size, size, size, dtype)], device, dtype)
    for case in cases.values():
        case.restore()
        case.call()
    times = time_alternating(cases, arguments.rounds, device, skipped)

    rate = 2 * size**3 / times["peak"]["median"]
    rows = []
    for variant in (*timed.ways, LIMIT):
        row = {"variant": variant, "off": timed.off.get(variant), "passes": {}}
        for name in TIMED:
            if (key := f"{variant}: {name}") in times:
                seconds = times[key]["median"]
                row["passes"][name] = {
                    **times[key],
                    "of_products": times[f"{LIMIT}: {name}"]["median"] / seconds,
                    "mfu": flop[key] / seconds / rate,
                    "kernels": kernels(cases[key], device),
                    "peak": peak_beside_gradients(cases[key], device),
                }
        rows.append(row)
    return {**setting._asdict(), "peak_rate": rate, "rows": rows, "skipped": skipped}


def peak_beside_gradients(case: Case, device: str) -> int | None:
    """Peak bytes of a call beside what was there before and the gradients; None on a CPU."""
    if device == "cpu":
        return None
    memory = peak(case, device)
    case.restore()
    return memory["peak"] - memory["gradients"]


def print_timed(result: dict) -> None:
    """Print the table of `time_setting`."""
    table = []
    for row in result["rows"]:
        cells = [row["variant"]]
        for name in TIMED:
            found = row["passes"].get(name)
            cells += [None] * 4 if found is None else [
                milliseconds(found), f"{found['of_products']:.0%}",
                f"{found['mfu']:.0%}", found["kernels"],
            ]  # fmt: skip
        memory = row["passes"].get(RECOMPUTED, {}).get("peak")
        off = row["off"] and "{output:.0e} / {input:.0e} / {weights:.0e}".format(**row["off"])
        table.append([*cells, megabytes(memory), off])
    measures = ("ms (of the host)", "products / it", "MFU", "kernels")
    columns = [f"{name}: {measure}" for name in TIMED for measure in measures]
    title = (
        f"{result['kind']} of the {result['model']}, trained: {result['training']}; a large "
        f"product's rate is {result['peak_rate'] / 1e12:,.2f} TFLOP/s"
    )
    last = ["peak, MiB", "output / gradient of input / of weights off by"]
    print_table(title, ["what", *columns, *last], table)


def milliseconds(taken: dict) -> str:
    """The median of the device, and on a GPU that of the host, which has to queue the kernels."""
    device, host = taken["median"] * 1e3, taken["host"]
    return f"{device:.3f}" if host is None else f"{device:.3f} ({host * 1e3:.3f})"


def time_layers(models: list[str], arguments: argparse.Namespace) -> list[dict]:
    """Time every setting of some models; print a table for each."""
    results = []
    for setting in settings(models):
        compiles = setting.training == ALL_WEIGHTS
        variants = [each for each in arguments.variants if compiles or each != "compiled"]
        result = time_setting(setting, arguments, variants)
        print_timed(result)
        results.append(result)
        torch.compiler.reset()
        release()
    return results
