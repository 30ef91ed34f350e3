"""The public loss functions: token weights, storage reuse, values per sequence, bad input."""

import math
import re

import pytest
import torch

from mr1_fast import (
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    token_logprobs,
    token_weights,
)
from mr1_fast.loss import grpo_loss_ref, spread, token_logprobs_ref

from ..data.loss import loss_rows, objective_of

N, D, V = 6, 4, 37
CU_SEQLENS = torch.tensor([0, 2, 2, 6])
LENGTHS = (3, 0, 5, 1)


# --- token weights ------------------------------------------------------------------------------


def cu_seqlens(lengths) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])


def averaged(loss_type: str, losses: list[list[float]], **settings) -> float:
    """The average of per-token losses of each sequence that `loss_type` names."""
    sequences = settings.get("num_sequences") or len(losses)
    tokens = sum(map(len, losses))
    if loss_type == "grpo":
        total = sum(sum(tokens) / len(tokens) for tokens in losses if tokens) / sequences
    elif loss_type == "luspo":
        total = sum(map(sum, losses)) / sequences
    elif loss_type == "dr_grpo":
        total = sum(map(sum, losses)) / (sequences * settings["max_completion_length"])
    else:
        total = sum(map(sum, losses)) / (settings.get("num_tokens") or tokens)
    return total / settings.get("accumulation_steps", 1)


CASES = [
    ("grpo", {}),
    ("grpo", {"num_sequences": 10}),
    ("grpo", {"accumulation_steps": 4}),
    ("luspo", {}),
    ("luspo", {"num_sequences": 10}),
    ("luspo", {"accumulation_steps": 4}),
    ("dr_grpo", {"max_completion_length": 7}),
    ("dr_grpo", {"max_completion_length": 7, "num_sequences": 10}),
    ("dr_grpo", {"max_completion_length": 7, "accumulation_steps": 4}),
    ("bnpo", {}),
    ("bnpo", {"num_tokens": 31}),
    ("bnpo", {"accumulation_steps": 4}),
    ("dapo", {"num_tokens": 31}),
]


@pytest.mark.parametrize("masked", [(), (1, 4, 8)], ids=["whole", "masked"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("loss_type", "settings"), CASES)
def test_weights_make_the_average_that_the_loss_type_names(loss_type, settings, dtype, masked):
    losses = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([token not in masked for token in range(len(losses))])
    weights = token_weights(
        cu_seqlens(LENGTHS).to(dtype), loss_type, mask=counts if masked else None, **settings
    )
    pairs = zip(losses.split(LENGTHS), counts.split(LENGTHS), strict=True)
    expected = averaged(
        loss_type, [sequence[kept].tolist() for sequence, kept in pairs], **settings
    )
    assert weights.dtype == torch.float32
    assert (weights * losses).sum().item() == pytest.approx(expected, rel=1e-5)
    assert (weights[~counts] == 0).all()


@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [
        ("grpo", {"num_sequences": 4}),
        ("luspo", {"num_sequences": 4}),
        ("dr_grpo", {"num_sequences": 4, "max_completion_length": 7}),
        ("bnpo", {"num_tokens": 9}),
        ("dapo", {"num_tokens": torch.tensor(9)}),
    ],
)
def test_micro_batches_add_up_to_the_whole(loss_type, settings):
    whole = token_weights(cu_seqlens(LENGTHS), loss_type, **settings)
    parts = [
        token_weights(cu_seqlens(lengths), loss_type, **settings)
        for lengths in (LENGTHS[:2], LENGTHS[2:])
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize(("loss_type", "settings"), CASES)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_weights_of_no_tokens(loss_type, settings, lengths):
    assert token_weights(cu_seqlens(lengths), loss_type, **settings).shape == (0,)


def test_weights_where_everything_is_masked_are_zero():
    for loss_type, settings in CASES:
        weights = token_weights(cu_seqlens(LENGTHS), loss_type, mask=torch.zeros(9), **settings)
        assert weights.tolist() == [0] * 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "gspo"}, "loss_type is 'gspo'.*grpo, dr_grpo, bnpo, dapo, luspo"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"loss_type": "dapo"}, "dapo divides by num_tokens"),
        (
            {"loss_type": "dapo", "num_tokens": 5, "accumulation_steps": 2},
            "dapo divides by num_tokens",
        ),
    ],
)
def test_weights_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        token_weights(CU_SEQLENS, **arguments)


def test_spread_copies_a_sequences_value_to_its_tokens():
    assert spread(torch.tensor([7.0, 8.0, 9.0]), CU_SEQLENS).tolist() == [7, 7, 9, 9, 9, 9]


# --- storage and values per sequence ------------------------------------------------------------


def test_inplace_puts_the_gradient_into_the_logits_storage():
    data = loss_rows(N, V)
    leaf = data["logits"].requires_grad_()
    expected = torch.autograd.grad(grpo_loss(leaf, **objective_of(data), beta=0.0).loss, leaf)[0]
    logits = leaf * 1
    storage = logits.data_ptr()
    result = grpo_loss(logits, **objective_of(data), beta=0.0, inplace=True)
    result.loss.backward()
    assert torch.equal(leaf.grad, expected)
    assert logits.data_ptr() == storage
    assert torch.equal(logits.detach(), expected)


def test_without_inplace_the_logits_stay():
    data = loss_rows(N, V)
    leaf = data["logits"].requires_grad_()
    before = leaf.detach().clone()
    grpo_loss(leaf, **objective_of(data), beta=0.0).loss.backward()
    assert torch.equal(leaf.detach(), before)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("factor", [1, 3])
def test_a_second_backward_is_refused(inplace, factor):
    data = loss_rows(N, V)
    leaf = data["logits"].requires_grad_()
    result = grpo_loss(leaf * 1, **objective_of(data), beta=0.0, inplace=inplace)
    (factor * result.loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        (factor * result.loss).backward()


def test_inplace_is_noticed_by_whoever_saved_the_logits_later():
    data = loss_rows(N, V)
    leaf = data["logits"].requires_grad_()
    logits = leaf * 1
    other = logits.square().sum()
    with pytest.raises(RuntimeError, match="inplace operation"):
        (grpo_loss(logits, **objective_of(data), beta=0.0, inplace=True).loss + other).backward()


@pytest.mark.parametrize("name", ["advantages", "is_weights"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_values_per_sequence_equal_values_per_token(name, dtype):
    data = loss_rows(N, V, torch.float64)
    arguments = objective_of(data, "old_logp") | {"beta": 0.0}
    values = torch.tensor([-1.0, 5.0, 0.5])
    per_token = grpo_loss(data["logits"], **arguments | {name: values[[0, 0, 2, 2, 2, 2]]})
    per_sequence = grpo_loss(
        data["logits"], **arguments | {name: values}, cu_seqlens=CU_SEQLENS.to(dtype)
    )
    assert per_token.loss.item() == per_sequence.loss.item()


def test_beta_and_temperature_may_be_tensors():
    data = loss_rows(N, V)
    arguments = objective_of(data, "old_logp", "ref_logp")
    floats = grpo_loss(data["logits"], **arguments, beta=0.25, temperature=0.5)
    for shape in ((), (1,)):
        beta, temperature = torch.full(shape, 0.25), torch.full(shape, 0.5, dtype=torch.float64)
        tensors = grpo_loss(data["logits"], **arguments, beta=beta, temperature=temperature)
        for value, right in zip(tensors, floats, strict=True):
            assert torch.equal(value, right)


def test_inputs_get_no_gradient_and_may_require_one():
    data = loss_rows(N, V)
    inputs = {
        name: value.requires_grad_() if value.is_floating_point() else value
        for name, value in objective_of(data, "old_logp", "ref_logp", "is_weights").items()
    }
    grpo_loss(
        data["logits"].requires_grad_(), **inputs, beta=torch.tensor(0.1, requires_grad=True)
    ).loss.backward()
    assert all(value.grad is None for value in inputs.values())


# --- the entropy --------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo"])
def test_an_entropy_is_subtracted_as_the_reference_does(surrogate, ratio_level):
    data = loss_rows(N, V, torch.float64)
    arguments = objective_of(data, "old_logp", "ref_logp") | dict(
        beta=0.1,
        surrogate=surrogate,
        ratio_level=ratio_level,
        cu_seqlens=CU_SEQLENS,
        entropy_weights=torch.tensor([0.1, 0.0, 0.2, 0.3, 0.0, 0.4], dtype=torch.float64),
        temperature=0.7,
    )
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    expected = grpo_loss_ref(hidden @ weight.T, **arguments)
    right = torch.autograd.grad(expected.loss, (hidden, weight))
    without = grpo_loss_ref(hidden @ weight.T, **arguments | {"entropy_weights": None})
    assert (expected.loss - without.loss).abs() > 0.1
    for result in (
        grpo_loss(hidden @ weight.T, **arguments),
        linear_grpo_loss(hidden, weight, **arguments, chunk_bytes=2 * V * 8),
    ):
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(torch.autograd.grad(result.loss, (hidden, weight)), right)


def test_an_entropy_of_weight_0_counts_nothing_even_if_it_is_nan():
    data = loss_rows(N, V)
    logits = data["logits"].clone()
    logits[1] = math.nan
    logits.requires_grad_()
    counts = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    arguments = objective_of(data) | {"token_weights": counts, "entropy_weights": counts}
    loss = grpo_loss(logits, **arguments, beta=0.0).loss
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and (logits.grad[1] == 0).all()


# --- bad input ----------------------------------------------------------------------------------

meta = torch.device("meta")
LOSS_CASES = {
    "targets dtype": (
        {"targets": torch.zeros(N)},
        "targets is torch.float32 (6,): expected torch.int64 (6,)",
    ),
    "targets shape": (
        {"targets": torch.zeros(5).long()},
        "targets is torch.int64 (5,): expected torch.int64 (6,)",
    ),
    "targets 2-d": (
        {"targets": torch.zeros(N, 1).long()},
        "targets is torch.int64 (6, 1): expected",
    ),
    "targets device": (
        {"targets": torch.zeros(N, device=meta).long()},
        "targets is on meta: expected cpu",
    ),
    "targets too large": (
        {"targets": torch.tensor([0, 1, 37, 3, 4, 5])},
        "targets holds 37: expected values in [0, 37)",
    ),
    "targets -100": (
        {"targets": torch.tensor([0, 1, -100, 3, 4, 5])},
        "targets holds -100: expected values in [0, 37)",
    ),
    "advantages shape": (
        {"advantages": torch.zeros(3)},
        "advantages has shape (3,): expected (6,) (per-sequence",
    ),
    "advantages sequences": (
        {"advantages": torch.zeros(2), "cu_seqlens": CU_SEQLENS},
        "advantages has shape (2,): expected (6,), or (3,)",
    ),
    "advantages device": (
        {"advantages": torch.zeros(N, device=meta)},
        "advantages is on meta: expected cpu",
    ),
    "weights shape": (
        {"token_weights": torch.zeros(2, 3)},
        "token_weights has shape (2, 3): expected (6,)",
    ),
    "weights per sequence": (
        {"token_weights": torch.zeros(3), "cu_seqlens": CU_SEQLENS},
        "token_weights has shape (3,): expected (6,)",
    ),
    "old_logp shape": ({"old_logp": torch.zeros(7)}, "old_logp has shape (7,): expected (6,)"),
    "ref_logp shape": ({"ref_logp": torch.zeros(())}, "ref_logp has shape (): expected (6,)"),
    "ref_logp device": (
        {"ref_logp": torch.zeros(N, device=meta)},
        "ref_logp is on meta: expected cpu",
    ),
    "is_weights shape": (
        {"is_weights": torch.zeros(4)},
        "is_weights has shape (4,): expected (6,)",
    ),
    "entropy_weights shape": (
        {"entropy_weights": torch.zeros(4)},
        "entropy_weights has shape (4,): expected (6,)",
    ),
    "no ref_logp": ({"beta": 0.04}, "beta is 0.04, but ref_logp is None"),
    "no ref_logp, tensor beta": ({"beta": torch.tensor(0.5)}, "ref_logp is None"),
    "beta shape": (
        {"beta": torch.ones(2), "ref_logp": torch.zeros(N)},
        "beta has shape (2,): expected a float or a 0-d",
    ),
    "temperature 0": ({"temperature": 0.0}, "temperature is 0.0: expected a number > 0"),
    "temperature nan": ({"temperature": math.nan}, "temperature is nan: expected a number > 0"),
    "temperature shape": (
        {"temperature": torch.ones(6)},
        "temperature has shape (6,): expected a float or a 0-d tensor",
    ),
    "surrogate": ({"surrogate": "ppo"}, "surrogate is 'ppo': choose one of clip, cispo, sapo"),
    "ratio_level": ({"ratio_level": "batch"}, "ratio_level is 'batch': choose token or sequence"),
    "no cu_seqlens": (
        {"ratio_level": "sequence"},
        "ratio_level is 'sequence', but cu_seqlens is None",
    ),
    "delta of cispo": (
        {"surrogate": "cispo", "delta": 2.0},
        "delta bounds the ratio of surrogate 'clip', not of 'cispo'",
    ),
    "clip_low": ({"clip_low": -0.1}, "clip_low is -0.1: expected a number ≥ 0"),
    "clip_high": ({"clip_high": math.nan}, "clip_high is nan: expected a number ≥ 0"),
    "delta": ({"delta": -1.0}, "delta is -1.0: expected a number ≥ 0"),
    "cu_seqlens dtype": (
        {"cu_seqlens": CU_SEQLENS.float()},
        "cu_seqlens is torch.float32 (4,): expected integers (S+1,)",
    ),
    "cu_seqlens shape": (
        {"cu_seqlens": CU_SEQLENS[None]},
        "cu_seqlens is torch.int64 (1, 4): expected integers (S+1,)",
    ),
    "cu_seqlens empty": (
        {"cu_seqlens": CU_SEQLENS[:0]},
        "cu_seqlens is torch.int64 (0,): expected integers (S+1,)",
    ),
    "cu_seqlens device": (
        {"cu_seqlens": CU_SEQLENS.to(meta)},
        "cu_seqlens is on meta: expected cpu",
    ),
    "cu_seqlens end": (
        {"cu_seqlens": torch.tensor([0, 5])},
        "cu_seqlens is [0, 5]: expected 0, then increasing ends",
    ),
    "cu_seqlens start": (
        {"cu_seqlens": torch.tensor([1, 6])},
        "cu_seqlens is [1, 6]: expected 0, then",
    ),
    "cu_seqlens order": ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, "the last being 6"),
}


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@pytest.mark.parametrize("case", LOSS_CASES)
def test_losses_refuse(case, linear):
    changes, message = LOSS_CASES[case]
    data = loss_rows(N, V)
    arguments = objective_of(data) | {"beta": 0.0} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        if linear:
            linear_grpo_loss(torch.zeros(N, D), torch.zeros(V, D), **arguments)
        else:
            grpo_loss(data["logits"], **arguments)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 3, V), "logits has shape (2, 3, 37): expected (N, V)"),
        (torch.zeros(V), "logits has shape (37,): expected (N, V)"),
        (
            torch.zeros(N, V, dtype=torch.int64),
            "logits is torch.int64: expected float32, bfloat16, float16 or float64",
        ),
        (torch.zeros(N, V, dtype=torch.complex64), "logits is torch.complex64: expected float32"),
    ],
)
@pytest.mark.parametrize("function", [grpo_loss, token_logprobs])
def test_logits_refused(function, logits, message):
    arguments = (
        objective_of(loss_rows(N, V)) | {"beta": 0.0}
        if function is grpo_loss
        else {"targets": torch.zeros(N).long()}
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        function(logits, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"token_weights": torch.ones(N + 1)},
            f"token_weights has shape ({N + 1},): expected ({N},)",
        ),
        ({"token_weights": torch.ones(N, device=meta)}, "token_weights is on meta: expected cpu"),
        ({"token_weights": [1] * N}, "token_weights is a list: expected a tensor"),
        ({"targets": torch.full((N,), -100)}, "targets holds -100: expected values in [0, 37)"),
        ({"targets": torch.zeros(N + 1).long()}, "targets is torch.int64"),
        ({"logits": torch.zeros(2, 3, V)}, "logits has shape (2, 3, 37): expected (N, V)"),
    ],
)
def test_weighted_logprobs_refused(changes, message):
    arguments = {
        "logits": torch.zeros(N, V),
        "targets": torch.zeros(N).long(),
        "token_weights": torch.arange(N) > 0,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        token_logprobs(**arguments | changes)


LINEAR_CASES = {
    "hidden shape": (
        {"hidden": torch.zeros(2, 3, D)},
        "hidden has shape (2, 3, 4): expected (N, D)",
    ),
    "weight shape": ({"weight": torch.zeros(V, 5)}, "weight has shape (37, 5): expected (V, 4)"),
    "weight transposed": (
        {"weight": torch.zeros(D, V)},
        "weight has shape (4, 37): expected (V, 4)",
    ),
    "bias shape": ({"bias": torch.zeros(D)}, "bias has shape (4,): expected (37,)"),
    "weight dtype": (
        {"weight": torch.zeros(V, D).bfloat16()},
        "weight is torch.bfloat16: expected",
    ),
    "bias dtype": ({"bias": torch.zeros(V).double()}, "bias is torch.float64: expected"),
    "hidden dtype": (
        {"hidden": torch.zeros(N, D).long(), "weight": torch.zeros(V, D).long()},
        "hidden is torch.int64",
    ),
    "weight device": (
        {"weight": torch.zeros(V, D, device=meta)},
        "weight is on meta: expected cpu",
    ),
    "targets": ({"targets": torch.full((N,), V)}, "targets holds 37: expected values in [0, 37)"),
    "temperature": ({"temperature": -1.0}, "temperature is -1.0: expected a number > 0"),
    "chunk_bytes": ({"chunk_bytes": 0}, "chunk_bytes is 0: expected a number of bytes > 0"),
}


@pytest.mark.parametrize("function", [linear_grpo_loss, linear_token_logprobs])
@pytest.mark.parametrize("case", LINEAR_CASES)
def test_linear_inputs_refused(case, function):
    changes, message = LINEAR_CASES[case]
    arguments = {
        "hidden": torch.zeros(N, D),
        "weight": torch.zeros(V, D),
        "targets": torch.zeros(N).long(),
    } | changes
    if function is linear_grpo_loss:
        arguments |= {"advantages": torch.zeros(N), "token_weights": torch.zeros(N), "beta": 0.0}
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**arguments)


WEIGHT_GRAD_CASES = {
    "shape": (
        torch.zeros(D, V),
        {},
        "weight_grad is torch.float32 (4, 37): expected torch.float32 (37, 4)",
    ),
    "dtype": (torch.zeros(V, D).double(), {}, "weight_grad is torch.float64 (37, 4): expected"),
    "no tensor": (True, {}, "weight_grad is a bool: expected a tensor"),
    "device": (torch.zeros(V, D, device=meta), {}, "weight_grad is on meta: expected cpu"),
    "leaf": (torch.zeros(V, D, requires_grad=True), {}, "weight_grad requires a gradient itself"),
    "frozen": (torch.zeros(V, D), {"weight": torch.zeros(V, D)}, "but weight requires no gradient"),
    "sequence": (
        torch.zeros(V, D),
        {"ratio_level": "sequence", "cu_seqlens": torch.tensor([0, N])},
        "weight_grad needs ratio_level='token'",
    ),
    "entropy": (
        torch.zeros(V, D),
        {"entropy_weights": torch.zeros(N)},
        "weight_grad needs ratio_level='token' and no entropy_weights",
    ),
}


@pytest.mark.parametrize("case", WEIGHT_GRAD_CASES)
def test_weight_grad_refused(case):
    weight_grad, changes, message = WEIGHT_GRAD_CASES[case]
    arguments = {
        "hidden": torch.zeros(N, D),
        "weight": torch.zeros(V, D, requires_grad=True),
        "targets": torch.zeros(N).long(),
        "advantages": torch.zeros(N),
        "token_weights": torch.zeros(N),
        "beta": 0.0,
        "weight_grad": weight_grad,
    } | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_grpo_loss(**arguments)


INPLACE_CASES = {
    "a leaf": (lambda leaf: leaf, "which is a leaf that requires a gradient"),
    "saved by exp": (torch.exp, "which ExpBackward0 still needs for its own gradient"),
    "saved by softmax": (lambda leaf: leaf.softmax(-1), "which SoftmaxBackward0 still needs"),
    "columns first": (
        lambda leaf: (leaf * 1).T.contiguous().T,
        "inplace needs rows of unit stride",
    ),
    "shared rows": (lambda leaf: (leaf * 1)[:1].expand(N, V), "logits"),
}


@pytest.mark.parametrize("case", INPLACE_CASES)
def test_inplace_refused(case):
    make, message = INPLACE_CASES[case]
    data = loss_rows(N, V)
    logits = make(data["logits"].requires_grad_())
    before = logits.detach().clone()
    with pytest.raises(ValueError, match=message):
        grpo_loss(logits, **objective_of(data), beta=0.0, inplace=True)
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("linear", [False, True])
def test_targets_may_be_strided(linear):
    torch.manual_seed(0)
    rows, weight = torch.randn(4, 11), torch.randn(11, 11)
    columns = torch.randint(0, 11, (4, 2))
    for targets in columns.unbind(1):
        logits = (rows @ weight.T if linear else rows).detach()
        expected = token_logprobs_ref(logits, targets.clone())
        result = (
            linear_token_logprobs(rows, weight, targets)
            if linear
            else token_logprobs(rows, targets)
        )
        torch.testing.assert_close(result, expected)


def test_a_row_of_nan_spoils_its_own_sequence_alone():
    torch.manual_seed(0)
    logits = torch.randn(4, 11)
    logits[1, 3] = math.nan
    logits.requires_grad_()
    rows = torch.ones(4)
    settings = dict(
        beta=0.0, ratio_level="sequence", cu_seqlens=torch.tensor([0, 2, 4]), old_logp=-2 * rows
    )
    result = grpo_loss(logits, torch.tensor([0, 1, 2, 3]), rows, rows, **settings)
    result.loss.backward()
    assert result.loss.isnan() and result.logp.isnan().tolist() == [False, True, False, False]
    assert (logits.grad[:2] == 0).all()
    assert logits.grad[2:].isfinite().all() and (logits.grad[2:] != 0).any()


def test_a_mask_of_the_lowest_finite_number_leaves_entropy_finite():
    logits = torch.randn(2, 6000)
    logits[:, :4500] = torch.finfo(torch.float32).min
    targets = torch.tensor([5000, 5999])
    expected = token_logprobs_ref(logits.double(), targets)
    result = token_logprobs(logits, targets)
    torch.testing.assert_close(tuple(each.double() for each in result), expected, rtol=0, atol=1e-5)
