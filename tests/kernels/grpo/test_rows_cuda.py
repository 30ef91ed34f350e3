"""csrc/'s CUDA kernel: its arithmetic on a CPU, part by part, and on a GPU the kernel itself."""

import ctypes
import math
import os
import shlex
import shutil
import subprocess
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from mr1_fast.kernels.grpo import rows_cuda
from mr1_fast.kernels.grpo.objective import Objective, RowResults
from mr1_fast.kernels.grpo.rows_cuda import CLUSTER_VARIANTS, ClusterTile
from mr1_fast.kernels.grpo.rows_native import grpo_arguments

from ...data.loss import (
    assert_results_within_bound,
    assert_within_bound,
    double,
    loss_rows,
    objective_of,
    reference,
)
from ...data.native import DTYPES, EVERYTHING, objective

CSRC = Path(__file__).parents[3] / "csrc"
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
GPU = torch.cuda.is_available() and rows_cuda.status()[0] is not None
CLUSTERS = GPU and torch.cuda.get_device_capability() >= (9, 0)
needs_clusters = pytest.mark.skipif(
    not CLUSTERS, reason="needs a GPU of sm_90 or newer and csrc/ built with nvcc"
)
GUARD = 64
TEMPERATURE = 1.5
TILES = [ClusterTile(0), ClusterTile(1), *CLUSTER_VARIANTS]


@pytest.fixture(scope="module")
def rows_by_parts(tmp_path_factory):
    """Return a function with the arguments of row_grpo, but for the number of parts at the end."""
    if COMPILER is None or not CSRC.exists():
        pytest.skip("no C++ compiler, or not a checkout")
    library = tmp_path_factory.mktemp("library") / "rows_by_parts.so"
    source = Path(__file__).with_name("rows_by_parts.cpp")
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", f"-I{CSRC}", str(source), "-o", str(library)]
    subprocess.run([*shlex.split(COMPILER), *flags], check=True)
    call = ctypes.CDLL(str(library)).rows_by_parts

    def run(logits, targets, objective, results, out, parts: int) -> None:
        arguments = grpo_arguments(logits, targets, objective, results, out, threads=1)
        call(ctypes.byref(arguments), parts)

    return run


def guarded(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a contiguous copy between NaNs (True for flags), and all of the memory."""
    guard = math.nan if tensor.is_floating_point() else True
    memory = tensor.new_full((tensor.numel() + 2 * GUARD,), guard)
    copy = memory[GUARD:-GUARD].view(tensor.shape)
    return copy.copy_(tensor), memory


def assert_guards_are_untouched(memory: torch.Tensor) -> None:
    for guard in (memory[:GUARD], memory[-GUARD:]):
        assert (guard.isnan() if guard.is_floating_point() else guard).all()


def on_device(objective: Objective, device) -> Objective:
    moved = (x.to(device) if isinstance(x, torch.Tensor) else x for x in objective)
    return Objective(*moved)


def run_rows(row_grpo, data, optional=(), inplace=True, **settings):
    """Return the results and the gradient; assert that nothing beside them was written."""
    logits, memory = guarded(data["logits"])
    out, out_memory = (logits, memory) if inplace else guarded(torch.full_like(logits, math.nan))
    results, results_memory = zip(*map(guarded, RowResults.empty(logits)), strict=True)
    results = RowResults(*results)
    arguments = on_device(objective(data, *optional, **settings), logits.device)
    row_grpo(logits, data["targets"], arguments, results, out)
    for written in (out_memory, *results_memory):
        assert_guards_are_untouched(written)
    if not inplace:
        assert torch.equal(logits.nan_to_num(), data["logits"].nan_to_num())
    return results, out


def assert_matches_fp64(row_grpo, data, optional=EVERYTHING, inplace=True, **settings):
    settings = {"beta": 0.1, "temperature": TEMPERATURE, "clip_high": 0.28, "delta": 1.6} | settings
    results, gradient = run_rows(row_grpo, data, optional, inplace, **settings)
    arguments = objective_of(data, *optional)
    exact, exact_gradient = reference(data["logits"].double(), **double(arguments), **settings)
    eager, eager_gradient = reference(data["logits"], **arguments, **settings)
    assert_results_within_bound(results._replace(loss=results.loss.sum()), eager, exact)
    # The ratio makes a relative error of logp's roundings, which are as large as logp.
    scale = (exact_gradient.abs().max() * exact.logp.abs().max() / 2).item()
    assert_within_bound(gradient, eager_gradient, exact_gradient, "gradient", scale)


def assert_special_rows(row_grpo, v: int, device: str) -> None:
    """Rows of NaN, infinities, masks, large numbers, weight 0 and targets outside [0, v)."""
    logits = 4 * torch.randn(10, v, generator=torch.Generator().manual_seed(0))
    logits[1, v // 2] = math.nan
    logits[2, v - 1] = math.inf
    logits[3] = -math.inf
    logits[4, : v // 2] = -math.inf
    logits[5, 1] = math.nan
    logits[8, v // 2 :] = torch.finfo(torch.float32).min
    logits[9] *= 1e4
    data = loss_rows(10, v, device=device, logits=logits)
    data["token_weights"].fill_(0.5)
    data["token_weights"][5] = 0
    data["targets"][[4, 8]] = torch.tensor([v - 1, 0], device=device)
    data["targets"][[6, 7]] = torch.tensor([-1, v], device=device)

    results, gradient = run_rows(row_grpo, data, beta=0.0)
    assert results.loss.isnan().tolist() == [i in (1, 2, 3, 6, 7) for i in range(10)]
    assert (gradient[[1, 2, 3, 5, 6, 7]] == 0).all() and results.loss[5] == 0
    assert (gradient[4, : v // 2] == 0).all() and (gradient[8, v // 2 :] == 0).all()
    kept = [0, 4, 8, 9]
    finite = {name: value[kept] for name, value in data.items()}
    assert_matches_fp64(row_grpo, finite, (), beta=0.0, temperature=1.0)


# --- the arithmetic on a CPU ----------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 8, 16])
@pytest.mark.parametrize("v", [8, 1100, 4352])  # with empty parts, with ragged and with full ones
def test_parts_of_a_row_make_the_loss_and_gradient(rows_by_parts, v, parts):
    data = loss_rows(9, v, temperature=TEMPERATURE)
    for inplace in (True, False):
        assert_matches_fp64(partial(rows_by_parts, parts=parts), data, inplace=inplace)


def test_parts_of_a_real_vocabulary(rows_by_parts):
    data = loss_rows(3, 151936, temperature=TEMPERATURE)
    assert_matches_fp64(partial(rows_by_parts, parts=8), data)


@pytest.mark.parametrize("parts", [1, 8])
@pytest.mark.parametrize("v", [8, 1100])
def test_parts_of_special_rows(rows_by_parts, v, parts):
    assert_special_rows(partial(rows_by_parts, parts=parts), v, "cpu")


# --- the kernel on a GPU --------------------------------------------------------------------------


@cache  # making rows on the host takes longer than all else
def rows_on_gpu(v: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    rows = 1 if v == 152064 else 19
    return loss_rows(rows, v, dtype, "cuda", temperature=TEMPERATURE)


@needs_clusters
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [8, 8320, 151936, 152064])  # 8,320: of 16 blocks, one has nothing
def test_loss_and_gradient(v, dtype, tile):
    for inplace in (True, False):
        row_grpo = partial(rows_cuda.row_grpo, tile=tile)
        assert_matches_fp64(row_grpo, rows_on_gpu(v, dtype), inplace=inplace)


@needs_clusters
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("v", [1024, 40960])
def test_special_rows(v, tile):
    assert_special_rows(partial(rows_cuda.row_grpo, tile=tile), v, "cuda")


@needs_clusters
@pytest.mark.parametrize("inplace", [True, False])
def test_equal_rows_come_out_equal(inplace):
    some = loss_rows(16, 32768, torch.bfloat16, "cuda")
    many = {name: value.repeat(250, *[1] * (value.dim() - 1)) for name, value in some.items()}
    results, gradient = run_rows(rows_cuda.row_grpo, many, inplace=inplace)
    for value in (*results, gradient):
        assert torch.equal(value, value[:16].repeat(250, *[1] * (value.dim() - 1)))


@needs_clusters
def test_strided_rows_leave_what_lies_between_them():
    data = loss_rows(5, 4096, torch.bfloat16, "cuda")
    wide = data["logits"].new_full((5, 4096 + 64), 7.0)
    rows = wide[:, 8:-56]
    rows.copy_(data["logits"])
    _, expected = run_rows(rows_cuda.row_grpo, data)
    arguments = on_device(objective(data), "cuda")
    rows_cuda.row_grpo(rows, data["targets"], arguments, RowResults.empty(rows), rows)
    assert torch.equal(rows, expected)
    assert (wide[:, :8] == 7).all() and (wide[:, -56:] == 7).all()


@needs_clusters
def test_rows_that_it_cannot_hold_or_reach_are_refused(monkeypatch):
    monkeypatch.setenv("MR1_FAST_CUDA", "1")
    logits = torch.zeros(2, 4104, dtype=torch.bfloat16, device="cuda")
    assert rows_cuda.takes(logits) and rows_cuda.takes(logits[:, :4096])
    assert not rows_cuda.takes(logits[:, 1:4097]), "rows do not begin at 16 bytes"
    assert not rows_cuda.takes(logits[:, :4099]), "rows do not end at 16 bytes"
    long = torch.zeros(1, 2**22, device="cuda")
    assert not rows_cuda.takes(long)
    data = loss_rows(1, 2**22, device="cuda", logits=long)
    with pytest.raises(RuntimeError, match=r"no thread block cluster .* 4,194,304 logits"):
        run_rows(rows_cuda.row_grpo, data)


@pytest.mark.skipif(not GPU or CLUSTERS, reason="needs a GPU before sm_90")
def test_a_gpu_without_clusters_falls_back_and_says_so(monkeypatch):
    monkeypatch.setenv("MR1_FAST_CUDA", "1")
    assert not rows_cuda.takes(torch.zeros(1, 64, device="cuda"))
    assert "no thread block clusters" in rows_cuda.status()[1]
