"""The kernels of a decode step, for sweep.py: attention, the linear layers, and their overlap.

The tile of a linear layer depends on the operation, the kind of its layers and the number of rows,
and so does its entry in the launch table: decode_swiglu_four_bit_64. A launch alone is shorter than
what it takes to time it, so a call is many launches, over weights or keys that exceed L2.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from unittest import mock

import torch
from decode_cases import KINDS, Contents, apart, layer_bytes, spans_of
from decode_tiles import BUCKETS, OVERLAPS, tiles
from sources import TABLE
from sweep_checks import Launch, Size, largest
from sweep_kernels import ROUNDING, Kernel
from torch import Tensor

from mr1_fast.kernels import tuned
from mr1_fast.kernels.decode.layer import Layer
from mr1_fast.kernels.decode.operations import add_rms_norm
from mr1_fast.kernels.decode.reference import attend_ref
from mr1_fast.kernels.four_bit.reference import dequantise_ref
from mr1_fast.kernels.overlap import possible_overlaps

USUAL_ROWS = 64
"""A group of 8 samples for each of 8 prompts: its entries come first."""
INTERPRETED_BF16 = 2e-2
"""`ROUNDING` of bf16 in Triton's interpreter, which cuts numbers off where a GPU rounds them."""
WIDTHS = {
    "linears": ((2048, 1536), (4608, 3584)),
    "swiglu": ((8960, 1536), (18944, 3584)),
    "parts": ((1536, 8960), (3584, 18944), (1536, 1536)),
}
"""(N, D) of the 2B and the 7B; parts are those of down_proj, and o_proj of the 2B."""


class DecodeKernel(Kernel):
    """A kernel of a decode step, compiled for its own number of rows."""

    modes, repeats, rows_to_compile = ("step",), 3, None
    benchmark = "sweep_decode"


def bound_of(x: Tensor) -> float:
    """The bound of errors for inputs x, relative to the largest output."""
    interpreted = x.dtype == torch.bfloat16 and not x.is_cuda
    return INTERPRETED_BF16 if interpreted else ROUNDING[x.dtype]


# --- linear layers --------------------------------------------------------------------------------


class LayerInputs:
    """Rows x (R, D), and layers with N outputs in all: as many sets as exceed L2."""

    def __init__(self, operation: str, contents: Contents, size: Size):
        n, d = size.columns, size.width
        third = n // 8
        widths = {"linears": (n - 2 * third, third, third), "swiglu": (n, n), "parts": (n,)}
        make = lambda: [  # noqa: E731
            contents.layer(width, d, bias=operation == "linears") for width in widths[operation]
        ]
        self.operation = operation
        self.x = contents.normal(size.rows, d)
        self.residual, self.weight = contents.normal(size.rows, n), contents.normal(n)
        self.sets = contents.sets(make, layer_bytes(make()))

    @cached_property
    def exact(self) -> Tensor:
        """The result of the first set in fp64, of weights and adapters as they are multiplied."""
        outputs = [exact_linear(self.x, layer) for layer in self.sets[0]]
        if self.operation == "swiglu":
            return torch.nn.functional.silu(outputs[0]) * outputs[1]
        return torch.cat(outputs, dim=1)


def exact_linear(x: Tensor, layer: Layer) -> Tensor:
    """`linear_ref` in fp64."""
    dtype, x = x.dtype, x.double()
    weight = dequantise_ref(layer.weight, dtype) if layer.in_four_bits else layer.weight
    y = x @ weight.double().T
    if layer.bias is not None:
        y += layer.bias
    if layer.adapter is not None:
        a, b = (each.to(dtype).double() for each in (layer.adapter.a, layer.adapter.b))
        y += layer.adapter.scale * (x @ a.T) @ b.T
    return y


class Linears(DecodeKernel):
    """linears, swiglu, or linear_parts with the norm that adds the parts up.

    The default of linear_parts is PyTorch's product where layers are plain.
    """

    tiny = Size(3, 72, 128)

    def __init__(self, operation: str, kind: str, bucket: int):
        self.operation, self.kind, self.bucket = operation, kind, bucket
        self.name = f"{self.family}_{bucket}"

    @property
    def family(self) -> str:
        return f"decode_{self.operation}{self.kind}"

    def variants(self) -> tuple[tuple, ...]:
        return tiles(self.operation, self.bucket)

    def sizes(self) -> list[Size]:
        return [Size(self.bucket, n, d) for n, d in WIDTHS[self.operation]]

    def checked_sizes(self) -> list[Size]:
        first = self.sizes()[0]
        if self.bucket != USUAL_ROWS:  # the same kernels
            return [first._replace(rows=self.bucket - 3)]
        return [first, Size(self.bucket - 3, 584, 1088)]

    def inputs(self, size: Size, dtype: torch.dtype, device: str, seed: int) -> LayerInputs:
        return LayerInputs(self.operation, Contents(self.kind, device, seed, dtype), size)

    def prepare(self, inputs: LayerInputs, mode: str) -> Launch:
        from mr1_fast.kernels.decode import linear_triton

        outputs = []

        def call(tile: tuple | None) -> None:
            outputs.clear()
            for layers in inputs.sets:
                if self.operation == "linears":
                    y = linear_triton.linears(inputs.x, layers, tile)
                elif self.operation == "swiglu":
                    y = linear_triton.swiglu(inputs.x, *layers, tile)
                else:
                    y = linear_triton.linear_parts(inputs.x, layers[0], tile)
                    add_rms_norm(inputs.residual, y, inputs.weight, 1e-6)
                outputs.append(y)

        def errors() -> dict[str, Tensor]:
            y, exact = outputs[0], inputs.exact
            y = torch.cat(y, dim=1) if isinstance(y, tuple) else y
            y = y.double().sum(0) if y.ndim == 3 else y
            bound = bound_of(inputs.x) * exact.abs().max().item()
            return {"output": largest(y - exact, bound)}

        return Launch(call, outputs.clear, errors)


# --- attention ------------------------------------------------------------------------------------


class AttendInputs:
    """R rows in groups, and pools of keys and values: as many as exceed L2.

    A size's columns are all query heads', its width all key heads'.
    """

    def __init__(self, contents: Contents, size: Size, own: int):
        r, q, kv = size
        self.head, prefix = (128, 600) if kv >= 128 else (16, 40)
        self.spans = spans_of(r, contents.device, prefix, own)
        if r % 2:  # mixed rows
            self.spans = self.spans[apart(r).to(contents.device)]
        tokens = (-(-r // 8)) * prefix + r * own
        pool = tokens, kv // self.head, self.head
        make = lambda: [contents.normal(*pool) for _ in range(2)]  # noqa: E731
        self.pools = contents.sets(make, 4 * tokens * kv)
        self.new = [contents.normal(r, n // self.head, self.head) for n in (q, kv, kv)]
        self.new += [contents.normal(r, self.head) for _ in range(2)]

    @cached_property
    def exact(self) -> Tensor:
        """The result with the first pools in fp64."""
        pools = [pool.double() for pool in self.pools[0]]
        new = [each.double() for each in self.new]
        return attend_ref(*new, *pools, self.spans, self.head**-0.5)


class Attend(DecodeKernel):
    """Attention, early and late in completions."""

    name, modes, repeats = "decode_attend", ("own 64", "own 512"), 20
    tiny = Size(9, 64, 32)

    def variants(self) -> tuple[tuple, ...]:
        from mr1_fast.kernels.decode.attention_triton import ATTEND_VARIANTS

        return ATTEND_VARIANTS

    def sizes(self) -> list[Size]:
        """Return those of Qwen2-VL 2B and 7B and of Qwen3-VL 2B."""
        small, large, many = Size(64, 1536, 256), Size(64, 3584, 512), Size(128, 1536, 256)
        return [small, large, many, Size(64, 2048, 1024)]

    def checked_sizes(self) -> list[Size]:
        return [Size(64, 1536, 256), Size(13, 3584, 512)]

    def inputs(self, size: Size, dtype: torch.dtype, device: str, seed: int) -> dict:
        own = lambda mode: int(mode.split()[1]) if size.width >= 128 else 17  # noqa: E731
        contents = Contents("", device, seed, dtype)
        return {mode: AttendInputs(contents, size, own(mode)) for mode in self.modes}

    def prepare(self, inputs: dict, mode: str) -> Launch:
        from mr1_fast.kernels.decode import attention_triton

        given, outputs = inputs[mode], []

        def call(setting: tuple | None) -> None:
            outputs.clear()
            for pools in given.pools:
                outputs.append(
                    attention_triton.attend(
                        *given.new, *pools, given.spans, given.head**-0.5, setting=setting
                    )
                )

        def errors() -> dict[str, Tensor]:
            bound = bound_of(given.new[0]) * given.exact.abs().max().item()
            return {"output": largest(outputs[0] - given.exact, bound)}

        return Launch(call, outputs.clear, errors)


# --- overlap --------------------------------------------------------------------------------------


@contextmanager
def with_overlap(setting: tuple | None) -> Iterator[None]:
    """Let the launch table have this setting of decode_overlap, or none; the rest as it is."""
    table = json.loads(TABLE.read_text())
    architecture = tuned.architecture(torch.device("cuda")) if torch.cuda.is_available() else None
    entries = {**table.get(architecture, {})}
    entries.pop("decode_overlap", None)
    if setting is not None:
        entries["decode_overlap"] = setting._asdict()
    with mock.patch.object(tuned, "read_table", lambda: {**table, architecture: entries}):
        yield


class Replayed:
    """Calls a function with each setting of overlap: a CUDA graph of it, captured when first used.

    On a CPU it calls the function itself.
    """

    def __init__(self, function: Callable[[], Tensor], device: str):
        self.function, self.device = function, device
        self.graphs: dict[tuple | None, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, setting: tuple | None) -> Tensor:
        if self.device == "cpu":
            with with_overlap(setting):
                return self.function()
        if setting not in self.graphs:
            with with_overlap(setting):
                self.function()  # compiles kernels and sets up libraries
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = self.function()
            self.graphs[setting] = graph, out
        graph, out = self.graphs[setting]
        graph.replay()
        return out


class Overlapped(DecodeKernel):
    """How far the kernels of whole layers run into one another: the numbers must stay the same.

    A size's columns are layers, its width that of the model: the 2B is plain, the 7B in 4 bits with
    adapters.
    """

    name, benchmark = "decode_overlap", "sweep_decode_overlap"
    compiles_alone = False  # graphs are captured, and the launch table is changed
    tiny = Size(3, 1, 128)

    def variants(self) -> tuple[tuple, ...]:
        if not torch.cuda.is_available():  # the script is tried out: one setting beside the default
            return OVERLAPS[-1:]
        return tuple(possible_overlaps(OVERLAPS, torch.device("cuda")))

    def sizes(self) -> list[Size]:
        return [Size(64, 8, 1536), Size(64, 8, 3584)]

    def checked_sizes(self) -> list[Size]:
        return [Size(64, 4, 1536)]

    def inputs(self, size: Size, dtype: torch.dtype, device: str, seed: int) -> Replayed:
        from decode_layers import random_layers

        name = {1536: "2B", 3584: "7B"}.get(size.width, "tiny")
        kind = KINDS[-1] if name == "7B" else ""
        torch.manual_seed(seed)
        return Replayed(random_layers(name, kind, size.columns, size.rows, device, dtype), device)

    def prepare(self, inputs: Replayed, mode: str) -> Launch:
        outputs: list[Tensor] = []
        with torch.no_grad():
            expected = inputs(None).clone()

        def call(setting: tuple | None) -> None:
            with torch.no_grad():
                outputs[:] = [inputs(setting)]

        def errors() -> dict[str, Tensor]:
            return {"beside no overlap": largest(outputs[0] - expected, 1e-30)}

        return Launch(call, outputs.clear, errors)


def decode_kernels() -> list[DecodeKernel]:
    """All of them; overlap comes last, since it is timed with the settings of the others."""
    buckets = USUAL_ROWS, *(bucket for bucket in BUCKETS if bucket != USUAL_ROWS)
    cases = [(bucket, kind, name) for bucket in buckets for kind in KINDS for name in WIDTHS]
    return [Attend(), *(Linears(name, kind, bucket) for bucket, kind, name in cases), Overlapped()]
