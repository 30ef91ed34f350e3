"""Dequantisation in Triton gives the bits of the reference, which are bitsandbytes' own."""

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mr1_fast.kernels.four_bit import dequantise_triton, operations
from mr1_fast.kernels.four_bit.dequantise_triton import load_four_bits
from mr1_fast.kernels.four_bit.reference import dequantise_ref

from ..data.four_bits import four_bit_weight

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
KINDS = pytest.mark.parametrize(
    ("kind", "nested", "block"),
    [("nf4", True, 64), ("nf4", False, 64), ("fp4", True, 128), ("fp4", False, 128)],
)


def reference(weights, dtype):
    return torch.cat([dequantise_ref(weight, dtype) for weight in weights])


# --- whole weights ------------------------------------------------------------------------------


@DTYPES
@KINDS
@pytest.mark.parametrize(
    ("d", "lengths"),
    [
        (64, (2,)),
        (96, (8, 52, 4)),  # blocks go on in the next row
        (1280, (33, 7, 1)),  # several programs, and several scales of scales
    ],
)
def test_weights_are_those_of_the_reference(device, d, lengths, kind, nested, block, dtype):
    weights = [
        four_bit_weight(n, d, device, kind=kind, nested=nested, block=block) for n in lengths
    ]
    out = operations.dequantise(weights, dtype)
    assert out.dtype == dtype and torch.equal(out, reference(weights, dtype))


def test_programs_write_nothing_else(device):
    weights = [four_bit_weight(n, 192, device) for n in (5, 3)]
    memory = torch.full((10, 192), 7.0, device=device)
    dequantise_triton.dequantise(weights, memory[1:9])
    assert torch.equal(memory[1:9], reference(weights, torch.float32))
    assert (memory[[0, 9]] == 7).all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_weights_of_the_same_input_are_one_launch(device, count, monkeypatch):
    launches = []
    monkeypatch.setattr(dequantise_triton, "launch", lambda *args, **options: launches.append(args))
    operations.dequantise([four_bit_weight(4, 64, device)] * count, torch.float32)
    assert len(launches) == 1


def test_other_ways_take_what_one_launch_cannot(device, monkeypatch):
    monkeypatch.setattr(dequantise_triton, "launch", None)
    for weights in (
        [four_bit_weight(3, 70, device)],  # the last block is a part
        [four_bit_weight(4, 64, device), four_bit_weight(4, 64, device, nested=False)],
    ):
        out = operations.dequantise(weights, torch.bfloat16)
        assert out.shape == (sum(weight.shape[0] for weight in weights), weights[0].shape[1])


class Allocations(TorchDispatchMode):
    """Context manager that collects the addresses of all storages that operators return."""

    def __init__(self):
        super().__init__()
        self.addresses = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        found = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.addresses |= {each.untyped_storage().data_ptr() for each in found}
        return result


def test_nothing_but_the_weights_is_allocated(device):
    weights = [four_bit_weight(4, 64, device)] * 3
    held = [each for weight in weights for each in vars(weight).values()]
    held = {each.untyped_storage().data_ptr() for each in held if isinstance(each, torch.Tensor)}
    with Allocations() as allocations:
        out = operations.dequantise(weights, torch.bfloat16)
    assert allocations.addresses - held - {0} == {out.data_ptr()}


# --- tiles --------------------------------------------------------------------------------------


@triton.jit
def _copy_kernel(
    OUT, PACKED, CODE, ABSMAX, ABSMAX_CODE, ABSMAX_SCALE, ABSMAX_OFFSET, N, D,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, ABSMAX_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
):  # fmt: skip
    """Write a weight tile by tile; columns beyond D go to those of the next row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DEPTH)
    for k in tl.range(0, D, DEPTH):
        w = load_four_bits(
            PACKED, CODE, ABSMAX, ABSMAX_CODE, ABSMAX_SCALE, ABSMAX_OFFSET,
            tl.minimum(row, N - 1), k, D, DEPTH, BLOCK, ABSMAX_BLOCK, NESTED,
            OUT.dtype.element_ty,
        )  # fmt: skip
        width = tl.cdiv(D, DEPTH) * DEPTH
        tl.store(OUT + row[:, None] * width + k + column[None, :], w, mask=(row < N)[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@KINDS
@pytest.mark.parametrize(("n", "d", "depth"), [(9, 384, 256), (13, 128, 128), (1, 1280, 512)])
def test_tiles(device, n, d, depth, kind, nested, block, dtype):
    weight = four_bit_weight(n, d, device, kind=kind, nested=nested, block=block)
    width = -(-d // depth) * depth
    out = torch.full((n, width), 7.0, dtype=dtype, device=device)
    _copy_kernel[(triton.cdiv(n, 8),)](
        out, weight.packed, weight.code, weight.absmax, weight.absmax_code, weight.absmax_scale,
        weight.absmax_offset, n, d, ROWS=8, DEPTH=depth, BLOCK=block,
        ABSMAX_BLOCK=weight.absmax_block, NESTED=nested,
    )  # fmt: skip
    assert torch.equal(out[:, :d], dequantise_ref(weight, dtype))
    assert (out[:, d:] == 0).all()
