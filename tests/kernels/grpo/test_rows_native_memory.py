"""What the native CPU kernels read and write, and the environment variables that switch them.

Guards, strides, far offsets and threads.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mr1_fast import grpo_loss
from mr1_fast.kernels import native
from mr1_fast.kernels.grpo import rows_native

from ...data.loss import loss_rows, objective_of
from ...data.native import (
    DTYPES,
    INSTRUCTION_SETS,
    SENTINEL,
    Guards,
    gradient_rows,
    run_rows,
    threads,
    using,
)

GAP = 24
SPLIT = 7 * 32768 + 5


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    with using(request.param):
        yield request.param


@pytest.fixture(params=["torch's threads", "threads of its own"])
def pool(request):
    """Have the kernels use the threads of torch's OpenMP library, or new ones."""
    library = native.status()[0]
    if library is None:
        pytest.skip("not built")
    openmp = native._torch_openmp()
    if openmp is None and request.param == "torch's threads":
        pytest.skip("torch has not loaded GNU's OpenMP")
    library.mr1_use_openmp(openmp if request.param == "torch's threads" else None)
    yield
    library.mr1_use_openmp(openmp)


def python(*arguments: str, **environment: str | None) -> subprocess.CompletedProcess:
    """A fresh Python; None takes a variable away."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("MR1_FAST_")
    }
    wanted = {name: value for name, value in (inherited | environment).items() if value is not None}
    return subprocess.run(
        [sys.executable, *arguments], env=wanted, capture_output=True, text=True, timeout=300
    )


def backward(data, kept, out):
    incoming = torch.linspace(-1, 1, len(out)), torch.linspace(0.5, 1, len(out))
    rows_native.row_logprobs_backward(
        data["logits"], data["targets"], torch.tensor(0.9), *kept, *incoming, out
    )


def wide(n: int, v: int, dtype: torch.dtype) -> torch.Tensor:
    """(n, v + GAP) of sentinel bytes."""
    return (
        torch.full((n * (v + GAP) * dtype.itemsize,), SENTINEL, dtype=torch.uint8)
        .view(dtype)
        .view(n, v + GAP)
    )


def assert_gap_untouched(tensor: torch.Tensor, v: int):
    assert (tensor[:, v:].contiguous().view(torch.uint8) == SENTINEL).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "v", "count"), [(5, 1, 1), (5, 37, 1), (5, 4099, 3), (1, SPLIT, 7)])
def test_kernels_write_all_of_their_outputs_and_nothing_else(
    instruction_set, monkeypatch, n, v, count, dtype
):
    data = loss_rows(n, v, dtype)
    data["token_weights"][0] = 1
    before = data["logits"].clone()
    with threads(count):
        expected, expected_out = gradient_rows(data)
        expected_logprobs = rows_native.row_logprobs(
            data["logits"], data["targets"], torch.tensor(0.9)
        )
        expected_backward = torch.empty_like(before)
        backward(data, expected_logprobs[1:], expected_backward)

        strided = wide(n, v, dtype)
        strided[:, :v] = before
        data["logits"] = strided[:, :v]
        out, from_backward = wide(n, v, dtype), wide(n, v, dtype)
        guards = Guards(monkeypatch)
        results = run_rows(data, out[:, :v])
        logprobs = rows_native.row_logprobs(data["logits"], data["targets"], torch.tensor(0.9))
        backward(data, logprobs[1:], from_backward[:, :v])
        assert torch.equal(data["logits"], before), "the logits are only read"

        inplace = run_rows(data, data["logits"])
        inplace_gradient = data["logits"].clone()
        data["logits"].copy_(before)
        backward(data, logprobs[1:], data["logits"])
    guards.assert_untouched()
    for tensor in (strided, out, from_backward):
        assert_gap_untouched(tensor, v)
    for ours in (results, inplace):
        assert all(map(torch.equal, ours, expected))
    assert all(map(torch.equal, logprobs, expected_logprobs))
    assert torch.equal(out[:, :v], expected_out) and torch.equal(inplace_gradient, expected_out)
    assert torch.equal(from_backward[:, :v], expected_backward) and torch.equal(
        data["logits"], expected_backward
    )


ROWS_AT_THE_END_OF_A_PAGE = """
import ctypes, faulthandler, mmap, sys
import torch
sys.path.insert(0, sys.argv[1])
from tests.data.loss import loss_rows
from tests.data.native import DTYPES, INSTRUCTION_SETS, run_rows, threads
from mr1_fast.kernels import native
from mr1_fast.kernels.grpo import rows_native, rows_torch

faulthandler.enable()
libc = ctypes.CDLL(None, use_errno=True)
PAGE, kept = mmap.PAGESIZE, []

def forbid(*pages):
    for page in pages:
        assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0

def new_pages(count):
    memory = mmap.mmap(-1, count * PAGE)
    kept.append(memory)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))

def between_forbidden_pages(values, at_end):
    size = values.numel() * values.element_size()
    pages = -(-size // PAGE)
    _, start = new_pages(pages + 2)
    forbid(start, start + (pages + 1) * PAGE)
    begin = start + PAGE + (pages * PAGE - size if at_end else 0)
    buffer = (ctypes.c_char * size).from_address(begin)
    return torch.frombuffer(buffer, dtype=values.dtype).view(values.shape).copy_(values)

def log_probs_of_rows_on_forbidden_pages(kernels, dtype, weights):
    memory, start = new_pages(len(weights))
    logits = torch.frombuffer(memory, dtype=dtype).view(len(weights), -1)
    logits.copy_(torch.linspace(-3, 3, logits.numel()).view(logits.shape))
    forbid(*(start + row * PAGE for row, weight in enumerate(weights) if weight == 0))
    row = logits, torch.zeros(len(weights), dtype=torch.int64), torch.tensor(0.8)
    logp, *statistics = kernels.row_logprobs(*row, weights)
    assert (logp != 0).tolist() == (weights != 0).tolist()
    gradient = torch.empty_like(logits)
    kernels.row_logprobs_backward(*row, *statistics, weights, weights, gradient)
    assert gradient.any(1).tolist() == (weights != 0).tolist()

library, runs = native.status()[0], 0
for name in INSTRUCTION_SETS:
    if library.mr1_use_instruction_set(name.encode()):
        continue
    for dtype in DTYPES:
        for weights in ([0.0, 1, 0, 0, 1, 0], [0.0, 0], [0.0, 1]):
            for kernels in (rows_native, rows_torch):
                log_probs_of_rows_on_forbidden_pages(kernels, dtype, torch.tensor(weights))
        for v in (1, 2, 7, 15, 16, 17, 31, 33, 63, 65, 127, 129, 1023, 4099):
            for at_end in (True, False):
                data = loss_rows(1, v, dtype)
                data["token_weights"].fill_(1)
                data = {key: between_forbidden_pages(value, at_end) for key, value in data.items()}
                out = between_forbidden_pages(torch.zeros(1, v, dtype=dtype), at_end)
                run_rows(data, out)
                temperature = torch.tensor(1.0)
                row = data["logits"], data["targets"], temperature
                logp, *kept_values = rows_native.row_logprobs(*row)
                for incoming in (torch.zeros(1), torch.ones(1)):
                    rows_native.row_logprobs_backward(*row, *kept_values, torch.ones(1), incoming,
                    out)
                run_rows(data, data["logits"])
                runs += 1
print(runs, "runs")
if len(sys.argv) > 2:  # the pages are in fact forbidden
    ctypes.string_at(out.data_ptr() - 1 if not at_end else out.data_ptr() + PAGE, 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
def test_nothing_is_read_or_written_beside_a_row_nor_any_row_of_weight_zero():
    if native.status()[0] is None:
        pytest.skip("not built")
    folder = str(Path(__file__).parents[3])
    run = python("-c", ROWS_AT_THE_END_OF_A_PAGE, folder)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[0]) >= 84
    caught = python("-c", ROWS_AT_THE_END_OF_A_PAGE, folder, "and beyond")
    assert caught.returncode < 0 and "Segmentation fault" in caught.stderr


@pytest.mark.parametrize("inplace", [False, True])
def test_offsets_beyond_32_bits(instruction_set, inplace):
    stride, v = 2**31, 37  # elements: 4 GiB of address space, of which two pages exist
    data = loss_rows(2, v, torch.bfloat16)
    data["token_weights"].fill_(1)
    expected, expected_out = gradient_rows(data)
    far = torch.empty(stride + v, dtype=torch.bfloat16).as_strided((2, v), (stride, 1))
    far.copy_(data["logits"])
    data["logits"] = far
    out = (
        far
        if inplace
        else torch.empty(stride + v, dtype=torch.bfloat16).as_strided((2, v), (stride, 1))
    )
    assert all(map(torch.equal, run_rows(data, out), expected))
    assert torch.equal(out, expected_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(instruction_set, pool, dtype):
    data = loss_rows(6, 20011, dtype)
    results = []
    for count in (1, 2, 5, 6):
        with threads(count):
            values, out = gradient_rows(data)
            logprobs = rows_native.row_logprobs(data["logits"], data["targets"], torch.tensor(0.9))
            from_backward = torch.empty_like(out)
            backward(data, logprobs[1:], from_backward)
            results.append((*values, out, *logprobs, from_backward))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize(("n", "count"), [(1, 7), (3, 7), (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_split_rows_agree_with_whole_ones(instruction_set, pool, dtype, n, count):
    data = loss_rows(n, SPLIT, dtype)
    data["token_weights"].fill_(1)
    columns = torch.tensor([0, SPLIT - 1, 150000])[:n]
    data["targets"] = columns
    whole, whole_out = gradient_rows(data)
    with threads(count):
        split, split_out = gradient_rows(data)
        logprobs = rows_native.row_logprobs(data["logits"], data["targets"], torch.tensor(0.9))
        inplace = data["logits"].clone()
        backward(data | {"logits": inplace}, logprobs[1:], inplace)
    from_backward = torch.empty_like(whole_out)
    kept = rows_native.row_logprobs(data["logits"], data["targets"], torch.tensor(0.9))
    backward(data, kept[1:], from_backward)
    for ours, expected in zip((*split, *logprobs), (*whole, *kept), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    for ours, expected in ((split_out, whole_out), (inplace, from_backward)):
        torch.testing.assert_close(
            ours.float(), expected.float(), rtol=max(4e-6, torch.finfo(dtype).eps), atol=1e-7
        )


PRINT_A_LOSS = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from mr1_fast import grpo_loss
    from mr1_fast.kernels import native
    from mr1_fast.kernels.grpo import rows_native
    from mr1_fast.kernels.grpo.rows import kernels_for
    logits = torch.sin(torch.arange(5 * 37.0) ** 1.5).view(5, 37).mul(4).requires_grad_()
    rows = torch.linspace(-1, 1, 5)
    result = grpo_loss(logits, torch.arange(5) * 9, rows, rows.abs(), beta=0.1, ref_logp=rows - 3)
    result.loss.backward()
    status = native.status()[1]
values = [result.loss.item(), *result.entropy.tolist(), *logits.grad.flatten().tolist()]
print(json.dumps({"status": status, "native": kernels_for(logits) is rows_native, "values": values,
                  "warnings": [str(w.message) for w in caught if "mr1_fast" in str(w.message)]}))
"""


def printed_loss(**environment) -> dict:
    run = python("-c", PRINT_A_LOSS, **environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_environment_variables_choose_what_runs():
    if native.status()[0] is None:
        pytest.skip("not built")
    forced = INSTRUCTION_SETS[-2:][0]  # avx2, neon or scalar
    on, off = printed_loss(MR1_FAST_ISA=forced), printed_loss(MR1_FAST_NATIVE="0")
    assert on["native"] and on["status"].startswith(f"{forced} (MR1_FAST_ISA)")
    assert not off["native"] and off["status"] == "off, as MR1_FAST_NATIVE=0 says"
    assert on["warnings"] == off["warnings"] == []
    assert on["values"] == pytest.approx(off["values"], rel=1e-5, abs=1e-6)
    assert on["values"] != off["values"], (
        "the same numbers bit for bit: was either switched at all?"
    )


def test_an_unknown_instruction_set_is_refused_clearly(monkeypatch):
    if native.status()[0] is None:
        pytest.skip("not built")
    monkeypatch.setenv("MR1_FAST_ISA", "avx1024")
    native.status.cache_clear()
    try:
        with pytest.raises(
            ValueError, match="MR1_FAST_ISA is 'avx1024', which this machine or build cannot run"
        ):
            rows_native.takes(torch.zeros(1, 1))
    finally:
        monkeypatch.undo()
        native.status.cache_clear()


def test_a_library_that_does_not_load_falls_back_and_says_so_once(monkeypatch, tmp_path):
    broken = tmp_path / "_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", broken)
    native.status.cache_clear()
    data = loss_rows(3, 37)
    try:
        with pytest.warns(UserWarning, match="are not loadable: .*; using PyTorch") as caught:
            for _ in range(2):
                assert grpo_loss(data["logits"], **objective_of(data), beta=0.0).loss.isfinite()
        assert len(caught) == 1
    finally:
        monkeypatch.undo()
        native.status.cache_clear()
