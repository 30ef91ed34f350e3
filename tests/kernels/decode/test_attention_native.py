"""The native decode attention against fp64, and what it appends, on every instruction set."""

import math

import pytest
import torch

from mr1_fast.kernels.decode import attention_native
from mr1_fast.kernels.decode.reference import attend_ref

from ...data.decode import exactly_normed, head_norms
from ...data.loss import assert_within_bound
from ...data.native import DTYPES, INSTRUCTION_SETS, Guards, threads, using


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def instruction_set(request):
    with using(request.param):
        yield request.param


def problem(dtype, heads, kv_heads, d, lengths, seed=0):
    """Make a call's arguments, with a row for each (group, prefix length, own length) of `lengths`.

    Rows of a group share a prefix. Tokens that no row may read are NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    start, prefixes, spans = 3, {}, []
    for group, prefix, own in reversed(lengths):  # so own tokens lie before and behind prefixes
        if group not in prefixes:
            prefixes[group] = start
            start += prefix + 2
        spans.append([prefixes[group], prefix, start, own])
        start += own + 2
    qkv = normal(rows, heads + 2 * kv_heads, d)
    angles = 6 * torch.rand(rows, d, generator=generator)
    keys, values = (torch.full((start, kv_heads, d), math.nan, dtype=dtype) for _ in range(2))
    for prefix_start, prefix, own_start, own in spans:
        for pool in (keys, values):
            pool[prefix_start : prefix_start + prefix] = normal(prefix, kv_heads, d)
            pool[own_start : own_start + own - 1] = normal(own - 1, kv_heads, d)
    return dict(
        zip(("q", "k", "v"), qkv.split([heads, kv_heads, kv_heads], dim=1), strict=True),
        cos=angles.cos().to(dtype),
        sin=angles.sin().to(dtype),
        keys=keys,
        values=values,
        spans=torch.tensor(spans[::-1], dtype=torch.int32).view(rows, 4),
        scale=d**-0.5,
    )


def copy_of(arguments, dtype=None):
    """Copy the arguments, and convert them to `dtype` if one is given."""
    return {
        name: x.to(dtype if x.is_floating_point() else None, copy=True) if torch.is_tensor(x) else x
        for name, x in arguments.items()
    }


def assert_agrees(arguments, label="output"):
    eager, exact = copy_of(arguments), copy_of(arguments, torch.float64)
    if norms := exact.pop("norms", None):
        exact["q"], exact["k"] = exactly_normed(exact["q"], exact["k"], norms)
    expected, exact_output = attend_ref(**eager), attend_ref(**exact)
    out = attention_native.attend(**arguments)
    assert out.dtype == arguments["q"].dtype and out.is_contiguous()
    assert_within_bound(out, expected, exact_output, label, scale=1.0)
    for pool in ("keys", "values"):
        same = torch.equal(arguments[pool].view(torch.uint8), eager[pool].view(torch.uint8))
        assert same, f"{label}: {pool} differ, those that were appended or others"


LENGTHS = {
    "one": [(0, 0, 1)],
    "few": [(0, 5, 1), (0, 5, 9), (1, 0, 2), (1, 0, 16), (2, 17, 1)],
    "tiles": [(0, 50, 14), (0, 50, 15), (1, 64, 65), (1, 64, 1), (2, 130, 77), (3, 0, 64)],
}


@pytest.mark.parametrize("d", [2, 8, 16, 20, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_agrees_with_fp64_and_appends_exactly(dtype, d):
    for heads, kv_heads in ((1, 1), (2, 2), (6, 2), (4, 1), (12, 2), (14, 2), (8, 1), (17, 1)):
        for name, lengths in LENGTHS.items():
            assert_agrees(
                problem(dtype, heads, kv_heads, d, lengths),
                f"{name}, {heads} heads, {kv_heads} of keys",
            )


@pytest.mark.parametrize("d", [2, 20, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_are_normed_before_the_rotation_with_pytorchs_bits(dtype, d):
    norms = head_norms(d, dtype)
    for heads, kv_heads in ((1, 1), (2, 1), (8, 2), (17, 1)):
        for name, lengths in LENGTHS.items():
            arguments = problem(dtype, heads, kv_heads, d, lengths)
            assert_agrees(arguments | {"norms": norms}, f"{name}, {heads} heads")


def test_each_norm_counts_where_it_belongs():
    arguments, norms = problem(torch.float32, 4, 2, 32, LENGTHS["few"]), head_norms(32)
    plain = copy_of(arguments)
    out = attention_native.attend(**plain, norms=norms)
    for name, value in {"q": torch.ones(32), "k": torch.ones(32), "eps": 1.0}.items():
        other = copy_of(arguments)
        changed = attention_native.attend(**other, norms=norms._replace(**{name: value}))
        assert not torch.equal(out, changed), name
        same_keys = torch.equal(plain["keys"].nan_to_num(), other["keys"].nan_to_num())
        assert same_keys == (name == "q"), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [0, 63, 64, 150, 199])
def test_one_token_that_outweighs_all_others_wherever_it_is(position, dtype):
    arguments = problem(dtype, 4, 2, 32, [(0, 100, 101)])
    arguments["cos"].fill_(1), arguments["sin"].fill_(0)
    start = int(arguments["spans"][0, 0 if position < 100 else 2]) + position % 100
    arguments["keys"][start] = 10 * arguments["q"][0, ::2]
    arguments["scale"] = 1.0
    assert_agrees(arguments)


def test_strided_rows_give_the_same_as_dense_ones_and_nothing_is_written_beside_the_output(
    monkeypatch,
):
    arguments = problem(torch.bfloat16, 6, 2, 64, LENGTHS["few"])
    assert not arguments["q"].is_contiguous()
    dense = arguments | {name: arguments[name].contiguous() for name in "qkv"}
    apart = arguments | {
        name: arguments[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"
    }
    guards = Guards(monkeypatch)
    first, *others = (attention_native.attend(**some) for some in (arguments, dense, apart))
    assert all(torch.equal(first, other) for other in others)
    guards.assert_untouched()


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(12, 2, 64), (7, 1, 20), (17, 1, 34)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_alone_and_beside_rows_that_share_its_prefix(dtype, heads, kv_heads, d):
    prefixes = [130] * 11 + [64, 63, 0, 0, 200, 200]  # a run longer than a block, and short ones
    lengths = [(prefix, prefix, 1 + 7 * i) for i, prefix in enumerate(prefixes)]
    arguments = problem(dtype, heads, kv_heads, d, lengths)
    together = attention_native.attend(**copy_of(arguments))
    for row in range(len(lengths)):
        one = {name: arguments[name][row : row + 1] for name in ("q", "k", "v", "cos", "sin")}
        alone = attention_native.attend(
            **copy_of(arguments) | one | {"spans": arguments["spans"][row : row + 1]}
        )
        assert torch.equal(alone[0], together[row])
    assert_agrees(arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_nothing(dtype):
    lengths = [(row // 4, 60, 1 + 3 * row) for row in range(12)]  # work enough for a team
    results = []
    for count in (1, 2):
        arguments = problem(dtype, 12, 4, 64, lengths)
        with threads(count):
            results.append(
                (attention_native.attend(**arguments), arguments["keys"], arguments["values"])
            )
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*results, strict=True)
    )


def test_nan_stays_in_its_row():
    arguments = problem(torch.float32, 4, 2, 32, LENGTHS["few"])
    clean = attention_native.attend(**arguments)
    arguments["q"][1, 2, 5] = math.nan
    out = attention_native.attend(**arguments)
    assert out[1, 2].isnan().all()
    out[1, 2] = clean[1, 2]
    assert torch.equal(out, clean)


def test_no_rows():
    arguments = problem(torch.float32, 4, 2, 32, [])
    assert attention_native.attend(**arguments).shape == (0, 4, 32)


def test_what_it_takes_and_what_it_refuses():
    arguments = problem(torch.float32, 4, 2, 32, LENGTHS["few"])
    q = arguments["q"]
    assert attention_native.takes(q) and attention_native.takes(q.bfloat16())
    for refused in (q.double(), q[..., :31], q.to("meta"), q.repeat(1, 1, 9)):
        assert not attention_native.takes(refused)
    wrong = {
        "q": q.half(),
        "k": arguments["k"][:, :1],
        "v": arguments["v"][:2],
        "cos": arguments["cos"][:, :16],
        "sin": arguments["sin"].half(),
        "keys": arguments["keys"][:, :1],
        "values": arguments["values"][1:],
        "spans": arguments["spans"].long(),
    }
    for name, value in wrong.items():
        with pytest.raises((ValueError, TypeError)):
            attention_native.attend(**arguments | {name: value})
    norms = head_norms(32)
    for changed in ({"q": norms.q[:16]}, {"k": norms.k[None]}, {"k": norms.k.half()}):
        with pytest.raises((ValueError, TypeError), match="a norm's weight"):
            attention_native.attend(**arguments, norms=norms._replace(**changed))
    apart = arguments["keys"].transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(TypeError, match="contiguous"):
        attention_native.attend(**arguments | {"keys": apart})
