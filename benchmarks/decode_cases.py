"""The operations of a decode step with random contents, ours and others, for one kind of layers.

A kind is named as in the launch table: "" (plain), "_lora", "_four_bit" (nf4, double quantisation)
or "_four_bit_lora".
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from mr1_fast.kernels.decode.layer import Adapter, Layer
from mr1_fast.kernels.decode.linear import linear_parts, linears, swiglu
from mr1_fast.kernels.decode.linear_tiles import default_tile
from mr1_fast.kernels.decode.operations import add_rms_norm, attend, sample
from mr1_fast.kernels.four_bit.operations import dequantise
from mr1_fast.kernels.four_bit.weight import FourBitWeight
from mr1_fast.kernels.layers.head_norms import HeadNorms
from mr1_fast.kernels.layers.operations import silu_mul

KINDS = ("", "_lora", "_four_bit", "_four_bit_lora")
RANK, SCALE = 16, 2.0
"""Of the adapters."""
PREFIX, OWN, GROUP = 600, 256, 8
"""Tokens that a row shares with the others of its group, and its own."""
HEAD = 128
MOST_SETS = 20
"""Sets of weights, keys or logits that launches rotate over, if they do not exceed L2 before."""
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


class Shape(NamedTuple):
    """Sizes of a model: width of hidden states, MLP, queries and keys; layers; vocabulary.

    And the channels of a head, and whether heads are normed; then linear layers have no biases.
    """

    d: int
    f: int
    q: int
    kv: int
    layers: int
    v: int
    head: int = HEAD
    is_normed: bool = False


MODELS = {
    "2B": Shape(1536, 8960, 1536, 256, 28, 151_936),
    "7B": Shape(3584, 18944, 3584, 512, 28, 152_064),
    "Qwen3-VL-2B": Shape(2048, 6144, 2048, 1024, 28, 151_936, is_normed=True),
}
"""Qwen2-VL 2B and 7B, and another family by its name."""


class Operation(NamedTuple):
    """An operation of a step."""

    name: str
    times: int
    """How often a step has it."""
    cost: int
    """The bytes that it must move: weights, activations, keys and values, a shared prefix once."""
    ways: dict[str, list[Callable[[], object]]]
    """How it is computed → calls with different data; the first one is the step's."""


# --- contents -------------------------------------------------------------------------------------


class Contents:
    """Makes random tensors and layers of one kind, always the same ones."""

    def __init__(self, kind: str, device: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16):
        self.kind, self.device, self.dtype = kind, device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)
        self.like = dict(device=device, generator=self.generator)

    def normal(self, *size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, dtype=self.dtype, **self.like).mul_(std)

    def sets(self, make: Callable[[], object], size: int) -> list:
        """What `make` makes, of `size` bytes: as often as exceeds L2 three times."""
        if self.device == "cpu":
            return [make()]
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        return [make() for _ in range(min(MOST_SETS, -(-3 * l2 // size)))]

    def layer(self, n: int, d: int, bias: bool = False) -> Layer:
        """A layer whose outputs are of the size of its inputs, with an adapter if its kind has."""
        weight = self.four_bit(n, d) if "_four_bit" in self.kind else self.normal(n, d, std=d**-0.5)
        adapter = None
        if "_lora" in self.kind:
            a = torch.randn(RANK, d, **self.like).mul_(d**-0.5)
            adapter = Adapter(a, torch.randn(n, RANK, **self.like).mul_(0.1), SCALE)
        return Layer(weight, self.normal(n) if bias else None, adapter)

    def four_bit(self, n: int, d: int) -> FourBitWeight:
        """A weight in nf4 with double quantisation."""
        blocks = n * d // 64
        integers = partial(torch.randint, 256, dtype=torch.uint8, **self.like)
        scale = torch.rand(-(-blocks // 256), **self.like)
        return FourBitWeight(
            packed=integers((n * d // 2,)),
            code=torch.tensor(NF4, device=self.device),
            absmax=integers((blocks,)),
            shape=(n, d),
            block=64,
            absmax_code=torch.linspace(-1, 1, 256, device=self.device),
            absmax_scale=(scale + 0.5) * d**-0.5,
            absmax_offset=torch.tensor(2 * d**-0.5, device=self.device),
            absmax_block=256,
        )


def layer_bytes(layers: Sequence[Layer]) -> int:
    """Bytes of the layers as they are stored."""
    tensors = []
    for each in layers:
        tensors += [each.weight, each.bias]
        tensors += [each.adapter.a, each.adapter.b] if each.adapter else []
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


# --- other ways -----------------------------------------------------------------------------------


def as_peft(x: Tensor, layer: Layer, weight: Tensor) -> Tensor:
    """A layer with its adapter as peft computes it, in the adapter's dtype."""
    y = linear(x, weight, layer.bias)
    if layer.adapter is None:
        return y
    a, b, scale = layer.adapter.a, layer.adapter.b, layer.adapter.scale
    return (y + linear(linear(x.to(a.dtype), a), b) * scale).to(x.dtype)


def by_bitsandbytes(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """The weight as bitsandbytes dequantises it."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    second = QuantState(
        weight.absmax_scale, code=weight.absmax_code, blocksize=256, dtype=torch.float32
    )
    state = QuantState(
        weight.absmax, weight.shape, weight.code, weight.block, "nf4", dtype,
        offset=weight.absmax_offset, state2=second,
    )  # fmt: skip
    return dequantize_4bit(weight.packed.view(-1, 1), state)


def others(layers: Sequence[Layer], x: Tensor) -> dict[str, Callable[[], list[Tensor]]]:
    """Ways to compute layers in PyTorch: name → the layers' outputs."""

    def apart(weights: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        return [as_peft(x, *pair) for pair in zip(layers, weights(), strict=True)]

    adapted = ", adapters as peft" if layers[0].adapter else ""
    weights = [layer.weight for layer in layers]
    if not layers[0].in_four_bits:
        return {f"F.linear{adapted}": partial(apart, lambda: weights)}
    lengths = [len_ for len_, _ in (layer.shape for layer in layers)]
    return {
        f"dequantise, F.linear{adapted}": partial(
            apart, lambda: dequantise(weights, x.dtype).split(lengths)
        ),
        f"bitsandbytes, F.linear{adapted}": partial(
            apart, lambda: [by_bitsandbytes(weight, x.dtype) for weight in weights]
        ),
    }


# --- operations -----------------------------------------------------------------------------------


def operations(shape: Shape, r: int, kind: str, device: str = "cuda") -> list:
    """Functions that make the operations of a step of R rows, one at a time to spare memory."""
    makers = (qkv, attention, out, after_out, gate_up, down, after_down, last_norm, head, sampling)
    return [partial(make, shape, r, Contents(kind, device)) for make in makers]


def linear_operation(
    name: str,
    ours: Callable,
    widths: Sequence[int],
    d: int,
    shape: Shape,
    r: int,
    contents: Contents,
    bias: bool = False,
    join: Callable = lambda outputs: outputs,
) -> Operation:
    """Layers of these widths on the same rows of d columns; `join` is what follows in PyTorch."""
    x = contents.normal(r, d)
    make = lambda: [contents.layer(n, d, bias) for n in widths]  # noqa: E731
    size = layer_bytes(make())
    ways: dict[str, list] = {name: []}
    for layers in contents.sets(make, size):
        ways[name].append(partial(ours, x, layers))
        for words, other in others(layers, x).items():
            both = partial(lambda other: join(other()), other)
            ways.setdefault(f"{name}: {words}", []).append(both)
    moved = sum(widths) // (2 if name == "swiglu" else 1)
    return Operation(name, shape.layers, size + 2 * r * (d + moved), ways)


def qkv(shape: Shape, r: int, contents: Contents) -> Operation:
    """Queries, keys and values."""
    widths = shape.q, shape.kv, shape.kv
    return linear_operation(
        "linears", linears, widths, shape.d, shape, r, contents, not shape.is_normed
    )


def gate_up(shape: Shape, r: int, contents: Contents) -> Operation:
    """The gated MLP up to its last product."""
    ours = lambda x, layers: swiglu(x, *layers)  # noqa: E731
    join = lambda outputs: silu_mul(torch.cat(outputs, dim=1), None)  # noqa: E731
    widths = shape.f, shape.f
    return linear_operation("swiglu", ours, widths, shape.d, shape, r, contents, join=join)


def parts(name: str, n: int, d: int, shape: Shape, r: int, contents: Contents) -> Operation:
    """A product as the launch table has it, by PyTorch, and split over its depth.

    The split one is timed with the norm that adds up its parts, beside the other with its norm.
    """
    ours = lambda x, layers: linear_parts(x, layers[0])  # noqa: E731
    made = linear_operation(name, ours, (n,), d, shape, r, contents)
    if contents.kind == "" and contents.device != "cpu":
        from mr1_fast.kernels.decode import linear_triton

        tile = default_tile("parts", r, torch.device(contents.device))
        residual, weight = contents.normal(r, n), contents.normal(n)

        def normed(tile: tuple | None, x: Tensor, layers: list) -> object:
            y = linear_triton.linear_parts(x, layers[0], tile)
            return add_rms_norm(residual, y, weight, 1e-6)

        calls = made.ways[name]
        for label, choice in (("and norm", None), ("split, and norm", tile)):
            made.ways[f"{name}, {label}"] = [partial(normed, choice, *call.args) for call in calls]
    return made


def out(shape: Shape, r: int, contents: Contents) -> Operation:
    """The product after attention."""
    return parts("o_proj", shape.d, shape.q, shape, r, contents)


def down(shape: Shape, r: int, contents: Contents) -> Operation:
    """The last product of the MLP."""
    return parts("down_proj", shape.d, shape.f, shape, r, contents)


def norm_operation(name: str, times: int, update: Tensor, contents: Contents) -> Operation:
    """The norm of x + update, which may be in parts: their bytes are not the least."""
    r, d = update.shape[-2:]
    x, weight = contents.normal(r, d), contents.normal(d)
    cost = 2 * (4 * r * d + d)
    return Operation(name, times, cost, {name: [partial(add_rms_norm, x, update, weight, 1e-6)]})


def after(name: str, n: int, d: int, shape: Shape, r: int, contents: Contents) -> Operation:
    """The norm after a product, which may leave parts."""
    update = linear_parts(contents.normal(r, d), contents.layer(n, d))
    return norm_operation(f"add_rms_norm after {name}", shape.layers, update, contents)


def after_out(shape: Shape, r: int, contents: Contents) -> Operation:
    return after("o_proj", shape.d, shape.q, shape, r, contents)


def after_down(shape: Shape, r: int, contents: Contents) -> Operation:
    return after("down_proj", shape.d, shape.f, shape, r, contents)


def last_norm(shape: Shape, r: int, contents: Contents) -> Operation:
    return norm_operation("add_rms_norm", 1, contents.normal(r, shape.d), contents)


def head(shape: Shape, r: int, contents: Contents) -> Operation:
    """The LM head, which is always plain."""
    x, v = contents.normal(r, shape.d), shape.v
    make = lambda: contents.normal(v, shape.d, std=shape.d**-0.5)  # noqa: E731
    weights = contents.sets(make, 2 * v * shape.d)
    cost = 2 * (v * shape.d + r * (shape.d + v))
    return Operation("head", 1, cost, {"head": [partial(linear, x, each) for each in weights]})


def sampling(shape: Shape, r: int, contents: Contents) -> Operation:
    uniform = torch.rand(r, **contents.like)
    rows = contents.sets(lambda: contents.normal(r, shape.v), 2 * r * shape.v)
    banned = shape.v - 1, shape.v - 2
    calls = [partial(sample, each, uniform, 1.0, banned) for each in rows]
    return Operation("sample", 1, 2 * r * shape.v, {"sample": calls})


def spans_of(r: int, device: str, prefix: int = PREFIX, own: int = OWN) -> Tensor:
    """Spans (R, 4) of rows in groups: prefixes first, then each row's own tokens."""
    groups = -(-r // GROUP)
    row = torch.arange(r, dtype=torch.int32, device=device)
    lengths = [torch.full_like(row, n) for n in (prefix, own)]
    starts = row // GROUP * prefix, groups * prefix + row * own
    return torch.stack([starts[0], lengths[0], starts[1], lengths[1]], dim=1)


def apart(r: int) -> Tensor:
    """An order of such rows in which no neighbours share a prefix, if there are two groups."""
    return torch.cat([torch.arange(i, r, GROUP) for i in range(min(GROUP, r))])


def attention(shape: Shape, r: int, contents: Contents) -> Operation:
    """Attention, and the same where a prefix is read once for each row."""
    spans, d = spans_of(r, contents.device), shape.head
    tokens = int(spans[:, 0].max()) + PREFIX + r * OWN
    pool = tokens, shape.kv // d, d
    new = [contents.normal(r, n // d, d) for n in (shape.q, shape.kv, shape.kv)]
    angles = [contents.normal(r, d) for _ in range(2)]
    make = lambda: [contents.normal(*pool) for _ in range(2)]  # noqa: E731
    ways = {"attend": [], "attend: rows apart": []}
    norms = HeadNorms(contents.normal(d), contents.normal(d), 1e-6) if shape.is_normed else None
    reordered = spans[apart(r).to(contents.device)]
    for pools in contents.sets(make, 4 * tokens * shape.kv):
        for name, rows in zip(ways, (spans, reordered), strict=True):
            ways[name].append(partial(attend, *new, *angles, *pools, rows, d**-0.5, norms))
    cost = 4 * (tokens * shape.kv + r * shape.q)
    return Operation("attend", shape.layers, cost, ways)
