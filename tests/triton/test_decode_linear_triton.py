"""Several linear layers in one kernel: the error is at most twice PyTorch's in the same dtype."""

from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from torch.nn.functional import linear, silu

from mr1_fast.kernels.decode import linear as decode_linear
from mr1_fast.kernels.decode.layer import Adapter, Layer
from mr1_fast.kernels.decode.linear_tiles import BY_PYTORCH, PartsTile, Tile, splits_of
from mr1_fast.kernels.decode.linear_triton import linear_parts, linears, swiglu
from mr1_fast.kernels.decode.operations import add_rms_norm
from mr1_fast.kernels.decode.reference import linear_ref
from mr1_fast.kernels.four_bit.reference import dequantise_ref
from mr1_fast.kernels.four_bit.weight import FourBitWeight
from mr1_fast.kernels.overlap import Overlap

TINY = Tile(columns=16, rows=16, depth=32, warps=4, stages=2)
FOUR_BIT = Tile(columns=16, rows=16, depth=64, warps=4, stages=2)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
BF16, FP32 = torch.bfloat16, torch.float32
SCALE = 0.3


class Case:
    """Rows of x of very different sizes, which lie apart, and layers to apply to them."""

    def __init__(self, rows: int, d: int, dtype: torch.dtype, device: str):
        self.d, self.dtype, self.device = d, dtype, device
        self.generator = torch.Generator().manual_seed(rows)
        sizes = 10 ** torch.linspace(-2, 2, rows)[:, None]
        self.x = (sizes * self.normal(rows, 2 * d)).to(device, dtype)[:, :d]

    def normal(self, *shape: int) -> torch.Tensor:
        """Draw standard normal numbers in fp32 on the CPU."""
        return torch.randn(shape, generator=self.generator)

    def layer(
        self,
        n: int,
        rank: int = 0,
        bias: bool = False,
        adapter_dtype: torch.dtype = FP32,
        nested: bool | None = None,
    ) -> Layer:
        """Draw a layer of n columns; in 4 bits if `nested` says how often it is quantised."""
        weight = (self.normal(n, self.d) / self.d**0.5).to(self.device, self.dtype)
        adapter = None
        if rank:
            a, b = self.normal(rank, self.d) / self.d**0.5, self.normal(n, rank) / rank**0.5
            adapter = Adapter(*(t.to(self.device, adapter_dtype) for t in (a, b)), SCALE)
        return Layer(
            weight if nested is None else four_bits(weight, nested),
            self.normal(n).to(self.device, self.dtype) if bias else None,
            adapter,
        )


def four_bits(weight: torch.Tensor, nested: bool) -> FourBitWeight:
    """Quantise a weight by bitsandbytes."""
    module = torch.nn.Module()
    module.out_features, module.in_features = weight.shape
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    module.weight = torch.nn.Parameter(packed, requires_grad=False)
    module.weight.quant_state = state
    return FourBitWeight.of(module)


def exactly(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Apply a layer in fp64 to the same numbers: what is stored in fp32 is rounded first."""
    weight, adapter, dtype = layer.weight, layer.adapter, x.dtype
    if layer.in_four_bits:
        weight = dequantise_ref(weight, dtype)
    y = linear(x.double(), weight.double(), None if layer.bias is None else layer.bias.double())
    if adapter is None:
        return y
    a, b = (matrix.to(dtype).double() for matrix in (adapter.a, adapter.b))
    return y + adapter.scale * (x.double() @ a.T) @ b.T


def gated(apply, x: torch.Tensor, gate: Layer, up: Layer) -> torch.Tensor:
    """Gate by one of the ways to apply a layer."""
    return silu(apply(x, gate)) * apply(x, up)


def assert_within_bound(ours, eager, exact):
    """Assert |ours − fp64| ≤ 2·|eager − fp64| + tiny, at the largest and on average."""
    mistakes, allowed = ((each.double() - exact).abs() for each in (ours, eager))
    tiny = 1e-6 * exact.abs().amax()
    assert mistakes.amax() <= 2 * allowed.amax() + tiny
    assert mistakes.mean() <= 2 * allowed.mean() + tiny


def check_linears(x: torch.Tensor, layers: list[Layer], tile: Tile) -> None:
    """Assert the shapes, the dtype and the error of each output."""
    outputs = linears(x, layers, tile=tile)
    assert [out.shape for out in outputs] == [(len(x), layer.shape[0]) for layer in layers]
    for out, layer in zip(outputs, layers, strict=True):
        assert out.dtype == x.dtype
        assert_within_bound(out, linear_ref(x, layer), exactly(x, layer))


@DTYPES
@pytest.mark.parametrize(
    ("rows", "d", "widths", "with_bias"),
    [
        (1, 64, (32,), True),
        (3, 96, (33, 7, 16), True),
        (17, 72, (32, 16), True),
        (64, 96, (32, 16, 16), False),
        (65, 32, (20,), False),
    ],
)
def test_linears(device, rows, d, widths, with_bias, dtype):
    case = Case(rows, d, dtype, device)
    check_linears(case.x, [case.layer(n, bias=with_bias) for n in widths], TINY)


@DTYPES
@pytest.mark.parametrize(("rows", "d", "f"), [(1, 64, 16), (17, 72, 11), (65, 64, 24)])
def test_swiglu(device, rows, d, f, dtype):
    case = Case(rows, d, dtype, device)
    gate, up = case.layer(f), case.layer(f)
    assert_within_bound(
        swiglu(case.x, gate, up, tile=TINY),
        gated(linear_ref, case.x, gate, up),
        gated(exactly, case.x, gate, up),
    )


@pytest.mark.parametrize("biased", [(0,), (1, 2)], ids=str)
def test_some_layers_have_a_bias(device, biased):
    case = Case(3, 64, BF16, device)
    check_linears(
        case.x, [case.layer(n, bias=i in biased) for i, n in enumerate((20, 7, 16))], TINY
    )
    gate, up = (case.layer(11, bias=i in biased) for i in range(2))
    assert_within_bound(
        swiglu(case.x, gate, up, tile=TINY),
        gated(linear_ref, case.x, gate, up),
        gated(exactly, case.x, gate, up),
    )


@pytest.mark.parametrize(
    ("rows", "d", "ranks", "dtype", "adapter_dtype"),
    [
        (1, 64, (1, 1, 1), BF16, FP32),
        (3, 72, (8, 0, 20), BF16, FP32),
        (17, 96, (0, 16, 0), BF16, BF16),
        (65, 64, (64, 8, 0), BF16, FP32),
        (3, 64, (20, 0, 8), torch.float16, FP32),
    ],
)
def test_linears_with_adapters(device, rows, d, ranks, dtype, adapter_dtype):
    case = Case(rows, d, dtype, device)
    layers = [
        case.layer(n, rank, bias=True, adapter_dtype=adapter_dtype)
        for n, rank in zip((33, 7, 16), ranks, strict=True)
    ]
    check_linears(case.x, layers, TINY)


@pytest.mark.parametrize("ranks", [(16, 16), (0, 8), (20, 0)], ids=str)
def test_swiglu_with_adapters(device, ranks):
    case = Case(17, 72, BF16, device)
    gate, up = (case.layer(11, rank) for rank in ranks)
    assert_within_bound(
        swiglu(case.x, gate, up, tile=TINY),
        gated(linear_ref, case.x, gate, up),
        gated(exactly, case.x, gate, up),
    )


@pytest.mark.parametrize(
    ("rows", "d", "ranks", "nested", "dtype"),
    [
        (1, 64, (0, 0), True, BF16),
        (17, 192, (0, 0), False, BF16),
        (3, 128, (8, 0), True, BF16),
        (65, 64, (0, 16), False, torch.float16),
    ],
)
def test_four_bits(device, rows, d, ranks, nested, dtype):
    case = Case(rows, d, dtype, device)
    layers = [
        case.layer(n, rank, bias=True, nested=nested)
        for n, rank in zip((33, 16), ranks, strict=True)
    ]
    check_linears(case.x, layers, FOUR_BIT)


def test_four_bits_where_d_is_no_multiple_of_a_step(device):
    case = Case(3, 192, BF16, device)
    layers = [case.layer(n, 8, nested=True) for n in (20, 7)]
    check_linears(case.x, layers, FOUR_BIT._replace(depth=128))


@pytest.mark.parametrize(("rank", "nested"), [(0, True), (0, False), (20, True)])
def test_swiglu_in_four_bits(device, rank, nested):
    case = Case(17, 128, BF16, device)
    gate, up = (case.layer(11, rank, nested=nested) for _ in range(2))
    assert_within_bound(
        swiglu(case.x, gate, up, tile=FOUR_BIT),
        gated(linear_ref, case.x, gate, up),
        gated(exactly, case.x, gate, up),
    )


@pytest.mark.parametrize(("rank", "nested"), [(0, None), (8, None), (0, True), (16, True)])
@pytest.mark.parametrize(("programs", "splits"), [(0, 1), (1, 3), (9, 5)])
def test_the_sum_of_the_parts_is_the_product(device, programs, splits, rank, nested):
    rows, n, d = 17, 20, 10 * 64  # ten steps: in three parts they are 4, 4 and 2
    case = Case(rows, d, BF16, device)
    layer = case.layer(n, rank, bias=True, nested=nested)
    tile = PartsTile(*FOUR_BIT, programs)
    if device == "cuda" and programs:
        pytest.skip("a GPU has more multiprocessors, and as many parts")
    assert splits_of(tile, rows, layer.shape, case.x.device) == splits
    parts = linear_parts(case.x, layer, tile=tile)
    if splits == 1:
        assert parts.shape == (rows, n) and parts.dtype == BF16
    else:
        assert parts.shape == (splits, rows, n) and parts.dtype == FP32
        parts = parts.sum(0).to(BF16)
    assert_within_bound(parts, linear_ref(case.x, layer), exactly(case.x, layer))


def test_parts_where_d_is_no_multiple_of_a_step(device):
    case = Case(3, 5 * 32 + 8, BF16, device)
    layer = case.layer(16, 4)
    parts = linear_parts(case.x, layer, tile=PartsTile(*TINY, 1))
    assert parts.shape[0] == 3
    summed = parts.sum(0).to(BF16)
    assert_within_bound(summed, linear_ref(case.x, layer), exactly(case.x, layer))


def test_a_plain_layer_has_no_parts_without_a_measurement(device):
    case = Case(3, 640, BF16, device)
    layer = case.layer(16, bias=True)
    expected = linear(case.x, layer.weight, layer.bias)
    assert torch.equal(linear_parts(case.x, layer), expected)
    assert torch.equal(linear_parts(case.x, layer, tile=BY_PYTORCH), expected)


@pytest.mark.parametrize("nested", [None, True])
def test_same_bits_in_any_order(device, reverse_grid, nested):
    case = Case(3, 256, BF16, device)
    layers = [case.layer(n, 8, bias=True, nested=nested) for n in (20, 7)]
    gate, up = (case.layer(11, 8, nested=nested) for _ in range(2))

    def compute() -> list[torch.Tensor]:
        return [
            *linears(case.x, layers, tile=FOUR_BIT),
            swiglu(case.x, gate, up, tile=FOUR_BIT),
            linear_parts(case.x, layers[0], tile=PartsTile(*FOUR_BIT, 2)),
        ]

    first, again = compute(), compute()
    reverse_grid()
    for results in zip(first, again, compute(), strict=True):
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_kernel_that_begins_early_computes_the_same(device):
    case = Case(17, 64, BF16, device)
    layers = [case.layer(n, 8) for n in (33, 16)]
    early = linears(case.x, layers, tile=TINY, overlap=Overlap(dependent=True))
    for ours, expected in zip(early, linears(case.x, layers, tile=TINY), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_public_functions_choose_by_dtype(device, dtype):
    case = Case(3, 128, dtype, device)
    gate, up = case.layer(16, 4, bias=True), case.layer(16, 4)
    (out,) = decode_linear.linears(case.x, (gate,))
    assert_within_bound(out, linear_ref(case.x, gate), exactly(case.x, gate))
    assert_within_bound(
        decode_linear.swiglu(case.x, gate, up),
        gated(linear_ref, case.x, gate, up),
        gated(exactly, case.x, gate, up),
    )
    parts = decode_linear.linear_parts(case.x, gate)
    summed = parts.sum(0).to(dtype) if parts.ndim == 3 else parts
    assert_within_bound(summed, linear_ref(case.x, gate), exactly(case.x, gate))


def test_what_the_kernel_does_not_take(device):
    case = Case(3, 128, BF16, device)
    plain, packed = case.layer(16, 4), case.layer(16, 4, nested=True)
    takes = decode_linear.takes
    assert takes([plain, case.layer(7)], case.x) and takes([packed], case.x)
    assert not takes([plain], case.x.float())
    assert not takes([plain, packed], case.x)
    assert not takes([packed, case.layer(16, nested=False)], case.x)
    assert not takes([plain, case.layer(16, 4, adapter_dtype=BF16)], case.x)
    assert not takes([case.layer(16, 129)], case.x)
    assert not takes([replace(packed, weight=replace(packed.weight, block=128))], case.x)
    assert not takes([Case(3, 96, BF16, device).layer(64, nested=True)], case.x)


def test_layers_that_do_not_fit_are_named(device):
    case = Case(3, 64, BF16, device)
    layer = case.layer(16)
    with pytest.raises(ValueError, match="there are 4 layers"):
        linears(case.x, [layer] * 4)
    with pytest.raises(ValueError, match="both need the same"):
        swiglu(case.x, layer, case.layer(7))
    with pytest.raises(ValueError, match="must be dense, for 32 columns"):
        linears(case.x[:, :32], [layer])
    with pytest.raises(ValueError, match="columns must be adjacent"):
        linears(case.x[:, ::2], [layer])


def test_a_graph_holds_the_launches_and_sees_new_adapters(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    case = Case(9, 128, BF16, device)
    kinds = [case.layer(48, 16), case.layer(48, 16, nested=True)]
    residual = case.normal(9, 48).to(device, BF16)

    def step() -> list[torch.Tensor]:
        found = []
        for layer in kinds:
            (out,) = decode_linear.linears(case.x, [layer])
            parts = decode_linear.linear_parts(case.x, layer)
            _, normed = add_rms_norm(residual, parts, residual[0], 1e-6)
            found += [out, decode_linear.swiglu(case.x, layer, layer), normed]
        return found

    eager = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # which fails if anything waits for the device
        captured = step()
    graph.replay()
    torch.testing.assert_close(captured, eager, rtol=0, atol=0)
    for layer in kinds:
        layer.adapter.b.mul_(-2)
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0, atol=0)
    assert not torch.equal(captured[0], eager[0])
